"""Grading of mathematical answers on tables of pairs: gold answer, response, whether the response is right.

`math_pairs_reported.jsonl` holds pairs of the kinds that users of graders reported. `math_pairs_own.jsonl` holds our
own pairs of the same kinds, and responses made to be accepted wrongly.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from drllm.questions.grading import grade_math

DATA = Path(__file__).with_name("data")


def pairs(name):
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "right", "rejected", "wrong", "accepted"),
    [("math_pairs_reported.jsonl", 142, 18, 47, 2), ("math_pairs_own.jsonl", 305, 98, 337, 60)],
)
def test_counts_of_wrong_grades(name, right, rejected, wrong, accepted):
    """The counts are those of the grader as it is: 169 of 189 and 484 of 642 pairs are judged rightly."""
    grades = Counter((row["is_right"], grade_math(row["response"], row["gold"])) for row in pairs(name))
    assert grades == {
        (True, True): right - rejected,
        (True, False): rejected,
        (False, False): wrong - accepted,
        (False, True): accepted,
    }
