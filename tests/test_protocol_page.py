"""docs/protocol.md against eval_tasks/benchmarks.json and the installed lm-eval, offline."""

import re
from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import TaskManager

from drllm.evaluation.protocol import AUTHORS_TASKS
from drllm.evaluation.results import benchmarks
from drllm.questions.sets import SETS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "protocol.md").read_text()
ROWS = {
    cells[0]: cells[1:]
    for line in PAGE.splitlines()
    if line.count("|") == 9 and "`" in line and (cells := [cell.strip() for cell in line.strip("|").split("|")])
}


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(ROOT / "eval_tasks"))


class Loader(yaml.SafeLoader):
    """Reads lm-eval's files without the functions that they name."""


Loader.add_constructor("!function", lambda loader, node: None)


def data_sets(manager, task: str) -> set[str]:
    """The Hub's data sets of a task or group, as its files name them."""
    index = manager.task_index[task]
    if index.yaml_path is None:  # a tag
        return {found for member in index.tags for found in data_sets(manager, member)}
    config = yaml.load(Path(index.yaml_path).read_text(), Loader)
    found = set()
    for member in config["task"] if isinstance(config["task"], list) else ():
        found |= data_sets(manager, member if isinstance(member, str) else member["task"])
    while "dataset_path" not in config and "include" in config:
        index_path = Path(index.yaml_path).parent / config.pop("include")
        config = yaml.load(index_path.read_text(), Loader) | config
    return found | {config["dataset_path"]} if "dataset_path" in config else found


def test_every_benchmark_has_its_row():
    assert list(ROWS) == [row["paper"] for row in benchmarks()]


@pytest.mark.parametrize("row", benchmarks(), ids=lambda row: row["task"])
def test_a_row_says_what_is_run(row, manager):
    task, metric, shots, tokens, data_set, gated, fetch = ROWS[row["paper"]]
    assert task == f"`{row['task']}`"
    assert row["task"] in manager.all_tasks
    assert metric == row["metric"].removesuffix(",none")
    assert int(shots) == row["shots"]
    limit = row["max_new_tokens"]
    limits = f"{limit[0]} (base), {limit[1]}" if isinstance(limit, list) else str(limit)
    assert tokens == ("none" if limit is None else limits)
    assert (gated == "yes") == (row["task"] == "gpqa_diamond_zeroshot")
    assert fetch.strip("`").split()[-2:] == ["fetch", row["task"]]
    name = data_set.strip("`")
    if row["task"].startswith("drllm_"):
        spec = SETS[row["task"].removeprefix("drllm_").replace("dart_", "dart-")]
        assert name == (spec.test_source or (spec.hub_path,))[0]
    elif row["task"] == "squadv2":  # a class of lm-eval names it
        source = Path(manager.task_index["squadv2"].yaml_path).with_name("task.py")
        assert f'DATASET_PATH = "{name}"' in source.read_text()
    else:
        found = data_sets(manager, row["task"])
        assert found
        assert all(re.fullmatch(name.replace("*", ".*"), each) for each in found)


def test_names_of_the_authors_are_tasks(manager):
    for name in ("dart", "gpqa_diamond", "truthfulqa", "agieval", "squadv2", "arc_challenge", "piqa", "aime24"):
        assert AUTHORS_TASKS.get(name, (name,))[0] in manager.all_tasks
        assert f"`{name}`" in PAGE or name not in AUTHORS_TASKS


def test_the_errors_of_table_4_cannot_be():
    assert round(100 * (0.3 * 0.7 / 198) ** 0.5, 1) == 3.3
    assert round(100 * (1 / 30 * 29 / 30 / 29) ** 0.5, 1) == 3.3
