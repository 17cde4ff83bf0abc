"""Toys of the evaluation: a base model, routers on it, and what eval.sh leaves of two runs."""

from pathlib import Path

import pytest

from tests.eval_toys import make_base, make_routed, make_run


@pytest.fixture(scope="module")
def base(tmp_path_factory, stock_model) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), stock_model)


@pytest.fixture(scope="module")
def routed(tmp_path_factory, base) -> Path:
    return make_routed(base, tmp_path_factory.mktemp("routed"))


@pytest.fixture
def two_runs(tmp_path) -> Path:
    """A folder with the runs base and router, on four questions of ARC and two of DART."""
    make_run(
        tmp_path,
        "base",
        {"drllm_arc_easy": [1, 0, 1, 1], "drllm_dart_2": [0, 0]},
        {"drllm_arc_easy": [8, 8, 8, 8], "drllm_dart_2": [20, 12]},
    )
    make_run(
        tmp_path,
        "router",
        {"drllm_arc_easy": [1, 1, 0, 1], "drllm_dart_2": [1, 0]},
        {"drllm_arc_easy": [6, 8, 8, 10], "drllm_dart_2": [15, 12]},
        paths=("0112",),
    )
    return tmp_path
