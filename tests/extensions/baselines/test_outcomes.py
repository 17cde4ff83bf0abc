"""Statistics of methods on test questions, by hand."""

import pytest

from extensions.baselines.outcomes import (
    Outcome,
    differences_by_set,
    method_row,
    mixture,
    paired_difference,
    share_recovered,
)


def outcome(right, layers):
    return Outcome(right, layers, right)


def test_a_mixture_has_the_layers_it_is_asked_for():
    one, other = outcome([1.0, 0.0], [8.0, 8.0]), outcome([1.0, 1.0], [10.0, 10.0])
    between = mixture([other, one], 8.5)
    assert between.mean_layers == pytest.approx(8.5)
    assert between.right == pytest.approx([1.0, 0.25])
    assert mixture([one, other], 7.9) is None
    assert mixture([one, other], 10.0).right == [1.0, 1.0]


def test_differences_are_paired_by_question():
    one, other = outcome([1.0, 1.0, 0.0, 1.0], [9.0] * 4), outcome([1.0, 0.0, 0.0, 1.0], [10.0] * 4)
    difference = paired_difference(one.right, other.right)
    assert difference["points"] == pytest.approx(25)
    # The differences 0, 1, 0, 0 have a standard deviation of 1/2, their mean of 4 one of 1/4.
    assert difference["high"] - difference["low"] == pytest.approx(2 * 1.96 * 25)
    assert paired_difference(one.right, one.right) == {"points": 0, "low": 0, "high": 0}


def test_rows_average_over_seeds():
    base = outcome([1.0, 0.0], [10.0, 10.0])
    row = method_row("group paths", [outcome([1.0, 1.0], [8.0, 9.0]), outcome([1.0, 0.0], [9.0, 10.0])], base, [base])
    assert (row["accuracy"], row["layers"]) == (0.75, 9.0)
    assert row["accuracy_std"] == pytest.approx(0.5**0.5 / 2)
    assert row["against_base"]["points"] == pytest.approx(25)
    assert "against_static" not in row


def test_the_share_of_a_known_gain_is_paired_by_question():
    base, known = outcome([0.0, 1.0] * 50, [10.0] * 100), outcome([1.0, 1.0] * 50, [8.0] * 100)
    half = outcome([1.0, 1.0, 0.0, 1.0] * 25, [9.0] * 100)
    shares = share_recovered(half, base, known)
    assert shares["share"] == 0.5
    assert 0.3 < shares["low"] < 0.4 < 0.6 < shares["high"] < 0.7
    # The known gain varies with the sample of questions, and the share with it, so the known paths are always 100%.
    assert share_recovered(known, base, known) == {"share": 1.0, "low": 1.0, "high": 1.0}
    assert share_recovered(base, base, known)["high"] == 0
    assert share_recovered(half, known, base) is None
    # Of two questions many samples hold only the one on which the known path gains nothing: they are left out.
    two, of_base = outcome([1.0, 1.0], [9.0, 9.0]), outcome([0.0, 1.0], [9.0, 9.0])
    assert share_recovered(two, of_base, two) == {"share": 1.0, "low": 1.0, "high": 1.0}


def test_a_mix_weighs_sets():
    one, other = outcome([1.0, 1.0, 0.0, 1.0], [9.0] * 4), outcome([0.0, 0.0, 0.0, 1.0], [9.0] * 4)
    found = differences_by_set(one, other, {"a": [0, 1], "b": [2, 3]}, {"a": 1, "b": 3})
    assert (found["a"]["points"], found["b"]["points"], found["all"]["points"]) == (100, 0, 50)
    assert found["mix"] == pytest.approx({"points": 25, "low": 25, "high": 25})
    assert "mix" not in differences_by_set(one, other, {"a": [0, 1]}, {})
