"""Each step run twice on the LLM, in processes of their own: the same labels, routers and numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.llm.steps import lines, numbers, run

pytestmark = pytest.mark.llm


def routers(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "routers" / "routers.safetensors")


def assert_equal_routers(first: Path, second: Path) -> None:
    one, two = routers(first), routers(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())


def training_record(checkpoint: Path) -> dict:
    """Metrics after training and after each epoch."""
    record = json.loads((checkpoint / "training.json").read_text())
    for epoch in record["history"]:
        for timing in ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"):
            epoch.pop(timing, None)
    return {name: record[name] for name in ("metrics", "history", "steps")}


def comparison(folder: Path) -> dict:
    result = json.loads((folder / "result.json").read_text())
    for row in result["rows"]:
        row["cost"] = None  # seconds
    return {name: result[name] for name in ("rows", "test_questions", "base")}


def test_labels(steps, labels, scratch):
    run(steps.search(scratch))
    expected = (labels / "labels.jsonl").read_bytes()
    assert (scratch / "labels.jsonl").read_bytes() == expected
    paths = {tuple(json.loads(line)["optimal_layer_config"]) for line in expected.splitlines()}
    assert len(paths) > 1, "labels that differ by question, or there is nothing to compare"


def test_training(steps, labels, trained, scratch):
    run(steps.training(labels, scratch / "again"))
    assert_equal_routers(trained, scratch / "again")
    assert training_record(trained) == training_record(scratch / "again")
    assert training_record(trained)["metrics"]["macro_f1"] > 0.8, "the routers learned their labels by heart"


def test_group_search(steps, grouped, scratch):
    run(steps.group_search(scratch / "again"))
    assert (scratch / "again" / "labels.jsonl").read_bytes() == (grouped / "labels.jsonl").read_bytes()
    assert lines(scratch / "again-measured") == lines(grouped.parent / "grouped-measured")


def test_evaluation(steps, trained, evaluated, scratch):
    run(steps.evaluation(trained, scratch))
    for name in ("base", "router"):
        assert numbers(scratch / name) == numbers(evaluated / name)
    assert numbers(evaluated / "base")["queries"] != numbers(evaluated / "router")["queries"]
    tables = [(folder / "table.md").read_text().split("Command:")[0] for folder in (scratch, evaluated)]
    assert tables[0] == tables[1]


def test_comparison(steps, trained, compared, scratch):
    run(steps.comparison(trained, scratch))
    assert comparison(scratch) == comparison(compared)
    assert lines(scratch / "work" / "test") == lines(compared / "work" / "test")
