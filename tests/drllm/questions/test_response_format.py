"""Limits, seeds and strict grading of responses, and how a manifest records them."""

import pytest

from drllm.questions.prompts import render_prompt
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import Question

ARC = Question("arc_easy", "a", "Which?", ("x", "y", "z", "w", "v"), ("A", "B", "C", "D", "E"), "B")
LAST = Question("arc_easy", "b", "Which?", ARC.choices, ARC.labels, "E")
DART = Question("dart-3", "c", "1/4+1/4?", (), (), r"\frac{1}{2}")


def test_the_default_is_ours():
    default = ResponseFormat()
    assert [default.limit(name, chat) for name in ("arc_easy", "dart-5") for chat in (False, True)] == [2, 10, 15, 15]
    assert default.grade(LAST, " E")
    assert default.grade(ARC, "The answer is B")
    assert default.grade(DART, r" \boxed{0.5}")
    assert not default.is_settled(DART, r" \boxed{0.5")
    assert default.is_settled(DART, r" \boxed{0.5} is")
    assert default.seed(DART) == default.seed(ARC) == ""


def test_limits_are_those_that_were_given():
    given = ResponseFormat({"dart-3": 20})
    assert (given.limit(DART, chat=True), given.limit("dart-4", chat=True)) == (20, 15)


def test_an_injected_box_ends_the_prompt_and_begins_the_response():
    boxed = ResponseFormat(inject_boxed=True)
    assert render_prompt(DART, boxed) == render_prompt(DART) + r" \boxed{"
    assert render_prompt(ARC, boxed) == render_prompt(ARC)
    assert boxed.grade(DART, r"\frac{1}{2}} because")
    assert not boxed.grade(DART, r"\frac{1}{3}} or \boxed{0.5}")
    assert not boxed.grade(DART, "0.5")  # never closed
    assert not boxed.is_settled(DART, r"\frac{1}{3")
    assert boxed.is_settled(DART, r"\frac{1}{3}}")
    assert boxed.grade(ARC, "B")


@pytest.mark.parametrize(
    ("response", "is_right"),
    [("B", True), (" B.", True), ("\nB) y", True), ("Because", False), ("(B)", False), ("b", False), ("", False),
     ("The answer is B", False), ("A or B", False), ("B2", False), ("Answer: B", True), ("Answer:\nB.", True),
     ("Answer: A", False), ("Answers: B", False), ("Answer: Answer: B", False), ("Answer: Because", False)],
)  # fmt: skip
def test_strict_letters(response, is_right):
    strict = ResponseFormat(strict_letters=True)
    assert strict.grade(ARC, response) is is_right
    assert not strict.grade(LAST, "E")
    assert strict.grade(DART, "0.5")
    for end in range(len(response) + 1):
        if strict.is_settled(ARC, response[:end]):
            assert strict.grade(ARC, response[:end]) is is_right


@pytest.mark.parametrize(
    ("question", "response", "plain", "of_base"),
    [(ARC, " C.", True, True), (ARC, "A good one", False, True), (ARC, "The answer is B", True, False),
     (ARC, "Because", False, False), (ARC, "Z", False, False),
     (DART, r"\boxed{x+1} so", True, False), (DART, r"\boxed{x+1", False, False), (DART, "3}", True, True),
     (DART, "12 square inches\n", True, False), (DART, "To find it we need", False, False), (DART, "", False, False)],
)  # fmt: skip
def test_what_holds_an_answer(question, response, plain, of_base):
    assert ResponseFormat().has_answer(question, response) is plain
    assert ResponseFormat(inject_boxed=True, strict_letters=True).has_answer(question, response) is of_base


def test_a_manifest_keeps_the_format():
    changed = ResponseFormat({"dart-3": 20}, inject_boxed=True, strict_letters=True)
    assert ResponseFormat.of_dict({"budget": 2.0} | changed.as_dict()) == changed
    assert ResponseFormat.of_dict({"budget": 2.0}) == ResponseFormat()
