"""Programs stopped by signals and by a full disk: the same command ends with equal results.

tests/test_data_generation.py has the same for the search.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.eval_toys import make_routed, make_tasks
from tests.search_toys import make_data, make_model

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Program:
    """A program that can be stopped.

    Attributes:
        command: after the interpreter, without --output_dir.
        begun: whether the run into a folder has finished something, but not all.
        result: what must be equal, read from the folder of a finished run.
    """

    command: list[str]
    begun: Callable[[Path], bool]
    result: Callable[[Path], object]

    def start(self, folder: Path, file_limit: int | None = None) -> subprocess.Popen:
        """The program in a session of its own; no file may grow beyond `file_limit` bytes."""

        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the background of a shell Ctrl-C is ignored
            if file_limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))

        return subprocess.Popen(
            [sys.executable, *self.command, "--output_dir", str(folder)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=prepare,
        )

    def finish(self, folder: Path) -> object:
        """Runs to the end; returns the result."""
        process = self.start(folder)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        return self.result(folder)


def evaluation_result(folder: Path) -> list:
    """Scores, layer counts and samples of both runs of eval.sh."""
    found = []
    for run in ("base", "router"):
        results = json.loads((folder / run / "results.json").read_text())
        found += [results["results"], results["config"]["block_applications"]]
        found += [(folder / run / "queries.jsonl").read_text(), (folder / "table.md").read_text().split("Command")[0]]
        for path in sorted((folder / run / "samples").glob("*.jsonl")):
            samples = [json.loads(line) for line in path.read_text().splitlines()]
            found.append([(sample["doc_id"], sample["resps"]) for sample in samples])
    return found


@pytest.fixture(scope="module")
def programs(tmp_path_factory, stock_model, tiny_labels) -> dict[str, Program]:
    folder = tmp_path_factory.mktemp("input")
    base = make_model(folder / "base", stock_model)
    checkpoint = make_routed(base, folder / "routed")
    questions = make_data(make_tasks(folder / "questions", 12), 40)
    training = f"train.py --data {tiny_labels} --run_name run --num_epochs 30 --warmup_steps 2 --learning_rate 0.01"
    evaluation = f"-m drllm.evaluation.eval_sh {checkpoint} --data_dir {questions} --device cpu --batch_size 1"
    search = f"-m extensions.groups.search --model {base} --data_dir {questions} --dataset arc_easy,dart-1 --limit 30"
    weights = "model.safetensors"
    return {
        "training": Program(
            training.split(),
            lambda out: any((out / "run" / "trainer").glob("checkpoint-*/trainer_state.json")),
            lambda out: (out / "run" / weights).read_bytes(),
        ),
        "group search": Program(
            [*search.split(), "--groups", "3", "--num_simulations", "80", "--batch_size", "2"],
            lambda out: any(path.stat().st_size for path in out.parent.glob(f"{out.name}-measured/*.jsonl")),
            lambda out: (out / "labels.jsonl").read_bytes(),
        ),
        "evaluation": Program(
            [*evaluation.split(), "--tasks", "drllm_arc_easy,drllm_dart_1"],
            lambda out: (
                (out / "base" / "answers.db").exists() and (out / "base" / "answers.db").stat().st_size > 20_000
            ),
            evaluation_result,
        ),
    }


NAMES = ("training", "group search", "evaluation")


@pytest.fixture(scope="module")
def undisturbed(programs, tmp_path_factory) -> Callable[[str], object]:
    """(name of a program) -> its result without a fault."""
    results = {}

    def result(name: str) -> object:
        if name not in results:
            results[name] = programs[name].finish(tmp_path_factory.mktemp("undisturbed") / "out")
        return results[name]

    return result


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("name", NAMES)
def test_stopped_by_a_signal(name, sent, programs, undisturbed, tmp_path):
    program, folder = programs[name], tmp_path / "out"
    process = program.start(folder)
    while not program.begun(folder):
        assert process.poll() is None, "it ended before the signal"
        time.sleep(0.01)
    os.killpg(process.pid, getattr(signal, sent))
    _, errors = process.communicate()
    assert process.returncode in (130, -getattr(signal, sent)), errors[-2000:]
    assert "Traceback" not in errors
    if sent == "SIGINT":
        assert errors.strip().splitlines()[-1].startswith("interrupted: ")
    assert program.finish(folder) == undisturbed(name)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("group paths", 1_000),
        ("group paths", 100_000),
        ("group paths by likelihood", 1_000),
        ("group paths by likelihood", 100_000),
        ("group search", 1_000),
        ("group search", 20_000),
        ("evaluation", 1_000),
        ("evaluation", 16_000),
    ],
)
def test_a_full_disk(name, limit, programs, undisturbed, tmp_path):
    program, folder = programs[name], tmp_path / "out"
    process = program.start(folder, limit)
    _, errors = process.communicate()
    assert process.returncode == 2, errors[-2000:]
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert re.match("error: .*(no space left|cannot write|full)", last), last
    assert program.finish(folder) == undisturbed(name)
