"""runs/qwen.sh on the miniature: killed at any moment, or on two processes, it gives what one quiet run gives."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from drllm.miniature import MINIATURE_DATA, MINIATURE_MODEL, ROOT

pytestmark = pytest.mark.slow
SIZE = ["LIMIT=3", "TEST=3", "CHOOSE=2", "SEEDS=0", "WARMUP=2", "METHODS=static,knob", "PATHS=skip 3", "GPUS=0"]


def command(folder, *more):
    model = [f"MODEL={MINIATURE_MODEL}", f"DATA_DIR={MINIATURE_DATA}", f"PYTHON={sys.executable}"]
    return ["bash", str(ROOT / "runs" / "qwen.sh"), *model, *SIZE, f"OUT={folder}", *more]


def run(folder, *more):
    done = subprocess.run(command(folder, *more), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def results(folder):
    """What must be equal: labels, the bench's rows without seconds, the forms, the table of eval.sh."""
    compared = json.loads((folder / "results" / "compare.json").read_text())
    for row in compared["rows"]:
        row.pop("cost")
    forms = json.loads((folder / "results" / "prompt_forms.json").read_text())
    labels = [path.read_bytes() for path in sorted(folder.rglob("labels.jsonl"))]
    tables = [  # without the command, which names the folder
        [line for line in path.read_text().splitlines() if line.startswith("|")]
        for path in sorted(folder.rglob("in_domain/table.md"))
    ]
    assert len(labels) == 3
    assert len(tables) == 1
    return compared["rows"], compared["differences"], forms["rows"], labels, tables


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet")
    run(folder)
    return folder


def test_a_killed_run_gives_the_same(quiet, tmp_path):
    pause = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(
            command(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(pause.uniform(10, 40))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run(tmp_path)
    assert results(tmp_path) == results(quiet)


def test_two_processes_give_the_same(quiet, tmp_path):
    run(tmp_path, "PROCESSES=2")
    assert results(tmp_path) == results(quiet)


def test_what_a_stage_packs_is_enough_for_the_next(quiet, tmp_path):
    (tmp_path / "packed.tar.gz").write_bytes((quiet / "packed.tar.gz").read_bytes())
    assert (tmp_path / "packed.tar.gz").stat().st_size < 16e6
    run(tmp_path, "STAGES=train_routers,compare")
    again, before = (json.loads((folder / "results" / "compare.json").read_text()) for folder in (tmp_path, quiet))
    names = {row["method"] for row in again["rows"]}
    assert [row["accuracy"] for row in again["rows"]] == [
        row["accuracy"] for row in before["rows"] if row["method"] in names
    ]
