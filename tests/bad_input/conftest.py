"""Input of the programs, valid until it is damaged: labels, checkpoints, questions and results."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import lm_eval.tasks
import pytest

from drllm import files
from drllm.training.config import RouterTrainingConfig
from drllm.training.trainer import train_routers
from tests.bad_input.programs import World
from tests.eval_toys import make_run, make_tasks
from tests.search_toys import make_data

POINT = {"routing_control": -0.5, "accuracy": 0.5, "accuracy_stderr": 0.1, "blocks_per_query": 4.0}
HISTOGRAM = {"edges": [0.0, 0.5, 1.0], "skip": [1, 0], "execute": [0, 1], "repeat": [1, 0]}
SWEEP = {"points": [POINT], "base": POINT | {"routing_control": 0.5}, "chosen": POINT, "probabilities": HISTOGRAM}


def add_counts(path: Path) -> None:
    """Adds the layer counts of `make_run`'s two queries to a results.json."""
    results = json.loads(path.read_text())
    shares = {"skip": 0.0, "execute": 1.0, "repeat": 0.0}
    counts = {"queries": 2, "blocks_per_query": 4.0, "blocks_per_query_stderr": 0.0, "share": shares}
    counts["share_per_block"] = {action: [share] * 4 for action, share in shares.items()}
    results["config"]["block_applications"] = {"drllm_arc_easy": counts}
    path.write_text(json.dumps(results))


@pytest.fixture(scope="session")
def valid(tmp_path_factory, tiny_base, tiny_labels) -> dict[str, Path]:
    """Valid input by name; tests must not change it."""
    folder = tmp_path_factory.mktemp("valid")
    config = RouterTrainingConfig(data=[str(tiny_labels)], output_dir=str(folder), run_name="trained", num_epochs=1)
    train_routers(config)
    questions = make_data(make_tasks(folder / "questions"), 6)
    for name in ("base", "router"):
        make_run(folder / "results", name, {"drllm_arc_easy": [1.0, 0.0]}, {"drllm_arc_easy": [4, 4]})
        add_counts(folder / "results" / name / "results.json")
    (folder / "results" / "experiment.json").write_text(json.dumps(SWEEP))
    (folder / "file").write_text("a file\n")
    return {
        "labels": tiny_labels,
        "base": tiny_base,
        "checkpoint": config.checkpoint,
        "routers": config.checkpoint / "routers",
        "questions": questions,
        "results": folder / "results",
        "file": folder / "file",
    }


@pytest.fixture
def world(valid, tmp_path, monkeypatch) -> World:
    """The valid input, and "none" (nothing is there), "unwritable", "measured" (a file lies beside it) and "out"."""
    names = {name: str(path) for name, path in valid.items()}
    names |= {name: str(tmp_path / name) for name in ("out", "none", "unwritable", "measured")}
    (tmp_path / "unwritable").mkdir()
    (tmp_path / "measured-measured").write_text("")
    allowed = os.access  # root may write everywhere
    monkeypatch.setattr(files.os, "access", lambda path, mode: "unwritable" not in str(path) and allowed(path, mode))
    catalogue = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)  # lm-eval's own takes a minute
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", catalogue)
    return World(names)
