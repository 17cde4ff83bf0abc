"""The LLM of `make llm`, a few questions, and what each step makes of them when nothing disturbs it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.eval_toys import make_tasks
from tests.llm.steps import Steps, model_folder, run
from tests.search_toys import make_data


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Iterator[Path]:
    """A folder for results that tests share; removed at the end, because a checkpoint has half a gigabyte."""
    folder = tmp_path_factory.mktemp("llm")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def scratch(tmp_path) -> Iterator[Path]:
    """A folder of one test, removed after it."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="session")
def steps(pytestconfig, workplace) -> Steps:
    """The commands of the steps; training and test questions are in the Hub's schema."""
    model = model_folder(pytestconfig.getoption("llm_model"))
    return Steps(model, make_tasks(make_data(workplace / "questions", 8), 8))


@pytest.fixture(scope="session")
def labels(steps, workplace) -> Path:
    """Labels of an undisturbed search."""
    run(steps.search(workplace / "labels"))
    return workplace / "labels"


@pytest.fixture(scope="session")
def trained(steps, labels, workplace) -> Path:
    """The routed checkpoint of an undisturbed training on `labels`."""
    run(steps.training(labels, workplace / "trained"))
    return workplace / "trained"


@pytest.fixture(scope="session")
def grouped(steps, workplace) -> Path:
    """Labels of an undisturbed search by groups."""
    run(steps.group_search(workplace / "grouped"))
    return workplace / "grouped"


@pytest.fixture(scope="session")
def evaluated(steps, trained, workplace) -> Path:
    """What an undisturbed eval.sh wrote for `trained`."""
    run(steps.evaluation(trained, workplace / "evaluated"))
    return workplace / "evaluated"


@pytest.fixture(scope="session")
def compared(steps, trained, workplace) -> Path:
    """What an undisturbed comparison wrote for `trained`."""
    run(steps.comparison(trained, workplace / "compared"))
    return workplace / "compared"
