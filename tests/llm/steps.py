"""The steps of `make llm` as commands over a few questions, and how a test kills them."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_MODEL = ROOT / "out" / "llm" / "model"
GET_MODEL = "make out/llm/model"
BATCH = 2  # questions per forward pass in every step
SETS = "arc_easy,arc_challenge"
TASKS = "drllm_ll_arc_easy,drllm_ll_arc_challenge"
LONGEST_PAUSE = 0.3  # seconds from the wanted progress to the kill, about a batch
POLL = 0.002  # seconds


def model_folder(folder: Path | None) -> Path:
    """The folder of the LLM, `out/llm/model` by default; the test fails if there is none."""
    folder = DEFAULT_MODEL if folder is None else Path(folder)
    if not (folder / "config.json").is_file():
        pytest.fail(f"no checkpoint in {folder}: run `{GET_MODEL}`, or pass --llm_model FOLDER", pytrace=False)
    return folder.resolve()


@dataclass(frozen=True)
class Steps:
    """Commands of the steps on one model and one folder of questions."""

    model: Path
    data: Path

    def search(self, labels: Path) -> list[str]:
        """data_generation.py: six questions, eight simulations each."""
        options = f"--dataset {SETS} --limit 3 --samples 3 --num_simulations 8 --batch_size {BATCH} --concurrency 2"
        return self._likelihood("data_generation.py", options, labels)

    def training(self, labels: Path, checkpoint: Path) -> list[str]:
        """train.py: few labels and large steps, so that the routers learn them by heart."""
        options = f"--data {labels} --model_id {self.model} --output_dir {checkpoint.parent} --eval_fraction 0"
        options += f" --run_name {checkpoint.name} --features_dir {checkpoint.parent / checkpoint.name}-features"
        options += f" --num_epochs 40 --warmup_steps 3 --learning_rate 0.01 --feature_batch_size {BATCH}"
        return [sys.executable, "train.py", *options.split()]

    def group_search(self, labels: Path) -> list[str]:
        """extensions.groups.search: one path per collection."""
        options = f"--dataset {SETS} --limit 4 --groups collection --num_simulations 6"
        options += f" --finalists 2 --batch_size {BATCH}"
        return self._likelihood("-m extensions.groups.search", options, labels)

    def evaluation(self, checkpoint: Path, output: Path) -> list[str]:
        """eval.sh: four questions per task, without and with routing."""
        options = f"{checkpoint} --data_dir {self.data} --limit 4 --batch_size {BATCH} --output_dir {output}"
        return ["./eval.sh", *options.split()]

    def lm_eval(self, checkpoint: Path, cache: Path, output: Path) -> list[str]:
        """drllm.evaluate: eight questions, with a cache of answers."""
        options = f"--model_args pretrained={checkpoint},dtype=float32 --tasks drllm_ll_arc_easy --data_dir {self.data}"
        options += f" --batch_size {BATCH} --use_cache {cache} --output_path {output} --log_samples"
        return [sys.executable, *f"-m drllm.evaluate {options} --device cpu".split()]

    def comparison(self, checkpoint: Path, folder: Path) -> list[str]:
        """extensions.baselines.compare: base, routers, random decisions and static paths on eight questions."""
        options = f"--model {self.model} --checkpoint paper={checkpoint} --data_dir {self.data} --dataset {SETS}"
        options += f" --test_questions 4 --methods shortgpt --skips 2 --train_questions 4 --batch_size {BATCH}"
        options += f" --reward likelihood --work_dir {folder / 'work'} --output {folder / 'result.json'}"
        return [sys.executable, *f"-m extensions.baselines.compare {options}".split()]

    def _likelihood(self, program: str, options: str, output: Path) -> list[str]:
        common = f"--reward likelihood --model {self.model} --data_dir {self.data} --output_dir {output}"
        return [sys.executable, *f"{program} {common} {options}".split()]


# ----------------------------------------------------------------------------------------------------
# Running and killing


def start(command: list[str], log) -> subprocess.Popen:
    """`command` on one thread in a process group of its own, so that all its processes can be killed at one instant."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    output = {"stdout": log, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0, **output)


def run(command: list[str]) -> str:
    """Runs a step to its end; returns what it printed."""
    with tempfile.TemporaryFile("w+") as log:
        process = start(command, log)
        try:
            process.wait()
        finally:
            kill(process)
        log.seek(0)
        printed = log.read()
    assert process.returncode == 0, f"{' '.join(command)}\n{printed[-3000:]}"
    return printed


def kill(process: subprocess.Popen) -> None:
    """kill -9 to the process group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_at(command: list[str], count: Callable[[], int], wanted: int, batch: int) -> int:
    """Starts a step and kills it at a random moment after `count()` has reached `wanted`.

    Args:
        command: the step.
        count: what it has finished so far, read from the disk.
        wanted: finished work to wait for.
        batch: most units of work that the step may finish at once. More would mean that it holds back finished work,
            which a kill loses.

    Returns:
        `count()` after the kill.
    """
    pause = random.uniform(0, LONGEST_PAUSE)
    with tempfile.TemporaryFile("w+") as log:
        process = start(command, log)
        try:
            largest, deadline, seen = 0, None, count()
            while deadline is None or time.monotonic() < deadline:
                if process.poll() is not None:
                    log.seek(0)
                    pytest.fail(f"{' '.join(command)}\nended before it was killed:\n{log.read()[-3000:]}")
                if deadline is None and seen >= wanted:
                    deadline = time.monotonic() + pause
                time.sleep(POLL)
                before, seen = seen, count()
                largest = max(largest, seen - before)
        finally:
            kill(process)
    assert process.returncode == -signal.SIGKILL
    kept = count()
    assert seen <= kept <= seen + batch, f"{seen} units were finished before the kill, {kept} are left"
    assert largest <= batch, f"{largest} units became safe at once; a batch has {batch}"
    return kept


# ----------------------------------------------------------------------------------------------------
# What steps leave on the disk


def lines(folder: Path) -> list[str]:
    """The complete lines of a folder's JSON Lines files."""
    text = "".join(path.read_text() for path in sorted(folder.glob("*.jsonl")))
    return text.splitlines()[: text.count("\n")]


def answers(cache: Path) -> dict[str, tuple[int, str]]:
    """Request -> (number of the row, answer) of a response cache; an answer written twice has a new number."""
    if not cache.exists():
        return {}
    database = sqlite3.connect(f"file:{cache}?mode=ro", uri=True)
    try:
        return {
            key: (number, entry) for key, number, entry in database.execute("SELECT key, rowid, entry FROM answers")
        }
    except sqlite3.OperationalError:  # the table is not written yet, or is being written
        return {}
    finally:
        database.close()


def numbers(run_folder: Path) -> dict:
    """Everything that a run of eval.sh measured: metrics, answers by document, blocks and paths per query."""
    results = json.loads((run_folder / "results.json").read_text())
    samples = {}
    for path in sorted((run_folder / "samples").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        samples[path.stem] = [(row["doc_id"], row["resps"], row["acc"]) for row in rows]
    return {
        "results": results["results"],
        "blocks": results["config"]["block_applications"],
        "samples": samples,
        "queries": (run_folder / "queries.jsonl").read_text(),
    }
