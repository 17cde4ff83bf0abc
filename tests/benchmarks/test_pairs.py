"""Ratios of speed: order, medians, and the guard against noise."""

import pytest
import torch

from benchmarks.pairs import Pairs, parse_threads, run_pairs, torch_threads
from drllm.errors import UserError


def test_sides_take_turns_and_the_first_pair_warms_up():
    calls = []

    def side(name: str, seconds: float):
        def run() -> float:
            calls.append(name)
            return seconds + (100 if len(calls) <= 2 else 0)

        return run

    pairs = run_pairs(side("reference", 6.0), side("ours", 2.0), 5, "test")
    assert pairs.reference == (6.0,) * 5
    assert pairs.ours == (2.0,) * 5
    assert pairs.ratio == 3
    assert pairs.problems() == []
    turns = [tuple(calls[i : i + 2]) for i in range(0, 12, 2)]
    assert all(set(turn) == {"reference", "ours"} for turn in turns)
    assert set(turns) == {("reference", "ours"), ("ours", "reference")}


def test_a_machine_that_slows_both_sides_leaves_the_ratio():
    """The ratio is that of the pairs; a ratio of medians over all runs would be the same here, one of means not."""
    pairs = Pairs((6.0, 6.0, 60.0, 6.0, 6.3), (2.0, 2.0, 20.0, 2.0, 2.0))
    assert pairs.ratio == 3
    assert pairs.problems() == []


@pytest.mark.parametrize(
    ("reference", "ours", "message"),
    [
        ((6.0, 9.0, 12.0, 6.0, 15.0), (2.0,) * 5, "spread of reference"),
        ((6.0,) * 5, (2.0, 3.0, 4.0, 2.0, 5.0), "spread of ours"),
        ((6.0, 6.0, 6.0, 6.6, 6.6), (2.4, 2.4, 2.4, 2.0, 2.0), "spread of ratio"),
        ((6.0,) * 4, (2.0,) * 4, "only 4 pairs"),
    ],
)
def test_noise_makes_a_ratio_unusable(reference, ours, message):
    pairs = Pairs(reference, ours)
    assert any(message in problem for problem in pairs.problems())
    assert "UNUSABLE" in str(pairs)
    assert pairs.record()["problems"] == pairs.problems()


def test_threads_are_set_and_restored():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("text", ["0", "one", "1,100000"])
def test_wrong_thread_counts_end_with_a_sentence(text):
    assert parse_threads("1") == [1]
    with pytest.raises(UserError, match="--threads"):
        parse_threads(text)
