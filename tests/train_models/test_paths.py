import subprocess
import sys

import pytest

from train_models.paths import (
    check_path,
    default_path,
    is_allowed,
    layer_indices_to_path,
    path_to_layer_indices,
    path_violation,
)


def test_layer_indices_and_paths_are_the_same_thing():
    assert path_to_layer_indices((1, 2, 0, 1)) == [0, 1, 1, 3]
    assert layer_indices_to_path([0, 1, 1, 3], 4) == (1, 2, 0, 1)
    assert layer_indices_to_path([], 3) == (0, 0, 0)
    assert path_to_layer_indices(default_path(3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("indices", "words"),
    [([0, 4], "block 4"), ([-1], "block -1"), ([1, 0], "must not decrease"), ([2, 2, 2], "more than twice")],
)
def test_layer_indices_that_are_no_path_are_refused(indices, words):
    with pytest.raises(ValueError, match=words):
        layer_indices_to_path(indices, 4)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ((1, 3, 1), "the value 3"),
        ((1, 0, 0, 0, 1), "at most two consecutive"),
        ((0, 0), "no block"),
        ((2, 2, 1, 1), None),
        ((0, 0, 1, 0, 0), None),
    ],
)
def test_constraints_hold_for_the_whole_path(path, words):
    violation = path_violation(path)
    assert (violation is None) == (words is None) == is_allowed(path)
    assert words is None or words in violation


def test_the_budget_bounds_the_length():
    assert is_allowed((2, 2, 1, 1), budget=1.5)
    assert not is_allowed((2, 2, 2, 1), budget=1.5)
    with pytest.raises(ValueError, match="budget"):
        check_path((2, 2, 2, 1), 4, budget=1.5)
    with pytest.raises(ValueError, match="3 entries"):
        check_path((1, 1, 1), 4)


def test_paths_need_no_torch():
    code = "import sys, train_models.paths; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
