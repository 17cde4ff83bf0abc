"""A checkpoint loads and decodes the same under every promised release of transformers, and says so outside of it."""

import ast
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from train_models import retrofit
from train_models._releases import NEWEST, OLDEST, check_release

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "train_models"
PROMISED = ["5.4.0", "5.6.0", "5.10.4", "5.16.1", "5.17.0", "5.23.0", "5.24.0"]
NEWEST_ON_THE_INDEX = "the newest on the index"  # so that a release that breaks the models is noticed
TOO_OLD = ["4.57.6", "5.3.0"]


def siblings_imported_by(file: Path) -> set[str]:
    """Names of the files in the same folder that `file` imports in the one form that transformers follows."""
    imports = [
        node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert all(node.level == 1 and node.module and "." not in node.module for node in imports), file
    return {f"{node.module}.py" for node in imports}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("modeling_*.py")), ids=lambda file: file.name)
def test_a_modeling_file_imports_every_sibling_that_it_needs(file):
    imported = siblings_imported_by(file)
    needed, new = set(), imported
    while new:
        needed |= new
        new = set().union(*(siblings_imported_by(FOLDER / name) for name in new)) - needed
    assert needed <= imported, f"{file.name} must import {', '.join(sorted(needed - imported))} itself"
    assert {"cache.py", "following.py", "routed.py"} <= imported


def test_the_check_of_the_release_comes_first():
    for file in FOLDER.glob("modeling_*.py"):
        first = next(node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ImportFrom))
        assert first.module == "_releases", file.name


def test_outside_of_the_range_one_sentence(caplog):
    with pytest.raises(ImportError, match=r"needs transformers 5\.4 or newer .* but 5\.3\.0 is installed"):
        check_release("5.3.0")
    with caplog.at_level(logging.WARNING):
        check_release("5.4.0")
        check_release(transformers.__version__)
        assert not caplog.records
        check_release("5.25.0.dev0")
    assert "is tested with transformers 5.4 to 5.24, but 5.25.0.dev0 is installed" in caplog.text


def test_the_range_is_that_of_these_tests_and_ends_at_the_pinned_release():
    minors = [tuple(map(int, release.split(".")[:2])) for release in PROMISED]
    assert (min(minors), max(minors)) == (OLDEST, NEWEST)
    assert f"transformers=={PROMISED[-1]}\n" in (ROOT / "requirements.txt").read_text()


def newest_on_the_index() -> str:
    """The newest release that pip finds; skips the test where there is no index."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers", "--disable-pip-version-check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if (found := re.match(r"transformers \((.+)\)", run.stdout)) is None:
        pytest.skip("no index of packages")
    return found[1]


@pytest.fixture(scope="module")
def checkpoints(decisive, tmp_path_factory) -> list[Path]:
    """Routed checkpoints: a small random one per family, and the miniature with its tokenizer."""
    folders = []
    for family in ("llama", "qwen2", "qwen3"):
        folders.append(tmp_path_factory.mktemp("compat") / family)
        decisive(family).save_pretrained(folders[-1])
    miniature = ROOT / "miniature" / "model"
    folders.append(tmp_path_factory.mktemp("compat") / "miniature")
    model = retrofit(str(miniature), dtype=torch.float32)
    with torch.no_grad():
        for router in model.model.routers:
            router.layers[-1].weight.mul_(4)
    model.save_pretrained(folders[-1])
    AutoTokenizer.from_pretrained(miniature).save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module")
def expected(checkpoints, run_under) -> list[dict]:
    """What the pinned release says of each checkpoint."""
    runs = [run_under(transformers.__version__, Path(__file__).with_name("decode.py"), str(c)) for c in checkpoints]
    reports = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
    assert len({tuple(path) for report in reports for path in report["paths"]}) > 4, "the paths should differ"
    return reports


@pytest.mark.slow
@pytest.mark.parametrize("release", [*PROMISED, NEWEST_ON_THE_INDEX])
def test_a_checkpoint_gives_the_same_under_each_promised_release(release, checkpoints, expected, run_under):
    if release == NEWEST_ON_THE_INDEX:
        release = newest_on_the_index()
    for checkpoint, report in zip(checkpoints, expected, strict=True):
        run = run_under(release, Path(__file__).with_name("decode.py"), str(checkpoint))
        assert run.returncode == 0, run.stderr[-3000:]
        actual = json.loads(run.stdout.splitlines()[-1])
        assert actual.pop("transformers") == release
        for name in actual.keys() & {"logits", "scores"}:
            torch.testing.assert_close(torch.tensor(actual.pop(name)), torch.tensor(report[name]))
        assert actual == {name: report[name] for name in actual}, checkpoint.name
        assert ("answers" in actual) == (checkpoint.name == "miniature")


@pytest.mark.slow
@pytest.mark.parametrize("release", TOO_OLD)
def test_an_older_release_ends_with_the_sentence(release, checkpoints, run_under):
    run = run_under(release, Path(__file__).with_name("decode.py"), str(checkpoints[0]))
    assert run.returncode != 0
    assert run.stderr.splitlines()[-1].startswith("ImportError: this model needs transformers 5.4 or newer")
