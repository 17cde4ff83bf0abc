"""Pre-training the miniature: a killed run is resumed, and its paths are the planned ones."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from safetensors.torch import load_file

from drllm.errors import UserError
from miniature.make import HERE
from miniature.questions import KINDS, draw
from miniature.training_paths import KnownPaths, RandomEdits, read_known_paths

ALL_KINDS = [kind for kinds in KINDS.values() for kind in kinds]


def test_known_paths_follow_the_kind_and_leave_a_share_to_the_default_path():
    paths = dict.fromkeys(ALL_KINDS, (1, 0, 1)) | {"sum": (1, 2, 0)}
    rng = random.Random(0)
    question = draw(rng, "dart-2", "sum", "pretrain")
    counts = Counter(tuple(KnownPaths(paths, 0.25).path(rng, question, 0.5)) for _ in range(2000))
    assert counts.keys() == {(1, 2, 0), (1, 1, 1)}
    assert 0.2 < counts[1, 1, 1] / 2000 < 0.3


def test_random_edits_grow_with_progress_up_to_the_rates_of_the_set():
    rng = random.Random(0)
    question = draw(rng, "dart-1", "larger", "pretrain")

    def skips(progress: float) -> float:
        paths = [RandomEdits(10, 0.0).path(rng, question, progress) for _ in range(500)]
        assert all("000" not in "".join(map(str, path)) for path in paths)
        return sum(path.count(0) for path in paths) / 5000

    assert skips(0.3) == 0
    assert 0.10 < skips(0.45) < 0.20
    assert 0.24 < skips(0.9) < 0.33


def test_a_file_of_known_paths_is_checked(tmp_path):
    file = tmp_path / "paths.json"
    good = dict.fromkeys(ALL_KINDS, "1102")
    file.write_text(json.dumps(good))
    assert read_known_paths(file)["median"] == (1, 1, 0, 2)
    for wrong, message in (
        ({k: p for k, p in good.items() if k != "sum"}, "missing kinds ..sum.."),
        (good | {"sums": "1102"}, "unknown kinds ..sums.."),
        (good | {"sum": "110"}, "one length"),
        (good | {"sum": "1103"}, "digits 0, 1 and 2"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=message):
            read_known_paths(file)


def test_only_the_copies_of_doubled_blocks_are_trained(tmp_path):
    known = tmp_path / "paths.json"
    known.write_text(json.dumps(dict.fromkeys(ALL_KINDS, "101" + "1" * 9)))
    output = tmp_path / "model"
    command = [sys.executable, str(HERE / "make.py"), "train", "--init", str(HERE / "model"), "--double", "1,9",
               "--known_paths", str(known), "--output_dir", str(output), "--steps", "2", "--batch_size", "4",
               "--processes", "1", "--muon_dtype", "float32"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (HERE / "model", output))
    sources = {0: 0, 2: 1, 3: 2, 10: 9, 11: 9}  # of blocks in the deeper model
    for block, source in sources.items():
        name = "model.layers.{}.mlp.up_proj.weight"
        assert bool((after[name.format(block)] == before[name.format(source)]).all()) == (block in (0, 3)), block
    assert (after["model.embed_tokens.weight"] == before["model.embed_tokens.weight"]).all()
    refused = subprocess.run([*command[:3], "--double", "1"], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "add --init" in refused.stderr


@pytest.mark.slow
def test_training_resumes_from_its_checkpoint(tmp_path):
    """A run that is killed after a checkpoint and started again ends with the weights of an undisturbed one."""

    def command(name: str, steps: int = 200) -> list[str]:
        return [sys.executable, str(HERE / "make.py"), "train", "--output_dir", str(tmp_path / name), "--steps",
                str(steps), "--save_steps", "50", "--processes", "1", "--batch_size", "8", "--blocks", "2",
                "--width", "32"]  # fmt: skip

    subprocess.run(command("whole"), check=True, capture_output=True)
    killed = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, start_new_session=True)
    while not (tmp_path / "killed.checkpoint").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    again = subprocess.run(command("killed"), check=True, capture_output=True, text=True)
    assert "from step 0" not in again.stdout
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all((whole[k] == resumed[k]).all() for k in whole)

    refused = subprocess.run(command("whole", steps=250), capture_output=True, text=True)
    assert refused.returncode != 0
    assert "other arguments" in refused.stderr
