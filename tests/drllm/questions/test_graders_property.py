"""Graders under thousands of damaged answers: no exception, no hang, nothing executed, no grade settled early."""

import string
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drllm.questions import math_answers
from drllm.questions.grading import grade_span
from drllm.questions.math_answers import grade_math
from drllm.questions.math_checker import SymbolicChecker
from drllm.questions.response_format import ResponseFormat
from drllm.questions.response_text import first_box, last_box
from drllm.questions.sets import Question

QUESTIONS = (
    Question("arc_easy", "a", "?", ("x", "y", "z"), ("A", "B", "C"), "B"),
    Question("arc_easy", "b", "?", ("x", "y", "z"), ("1", "2", "3"), "3"),
    Question("dart-1", "c", "?", (), (), "7"),
    Question("squadv2", "d", "?", ("red tower", "tower"), (), "red tower"),
)
LABEL_PIECES = (
    *"ABCabc123", " ", "\n", ".", "(", ")", "*", ",", "'", "-", "_", "$", "/", "Ｂ", "answer is ", "because", "the ",
    "tower", "red", "or ", "答案是", "<think>", "</think>", "</s>", "would be ", "vitamin ", "option ", "Réponse : ",
)  # fmt: skip
LATEX_PIECES = (
    r"\boxed{", "{", "}", "$", "\\", r"\frac", r"\sqrt", r"\text{", r"\left(", r"\right)", "^", "_", "!", "%", "&", "#",
    "+", "-", "*", "/", "=", ",", ".", "(", ")", "[", "]", "|", "0", "1", "7", "99", "x", "y", r"\pi", "e", "i", " ",
    "\n", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", r"\infty", r"\cup", r"\int", r"\sum", r"\lim", "\x00", "\u2028",
    "½", "∞",
)  # fmt: skip


def pieces(choices, most):
    return st.lists(st.sampled_from(choices), max_size=most).map("".join)


ANSWERS = st.one_of(st.text(max_size=60), pieces(LABEL_PIECES, 12), pieces(LATEX_PIECES, 14))
PLENTY = settings(max_examples=3000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture
def compared_by_string(monkeypatch):
    """No helper process: what is tested is everything around the symbolic comparison."""
    monkeypatch.setattr(math_answers, "_same_value", lambda answer, candidate: answer == candidate)


@settings(PLENTY, max_examples=1500)
@given(response=ANSWERS, continuation=ANSWERS, strict=st.booleans(), boxed=st.booleans())
def test_a_settled_grade_never_changes(compared_by_string, response, continuation, strict, boxed):
    response_format = ResponseFormat(strict_letters=strict, inject_boxed=boxed)
    for question in QUESTIONS:
        grade = response_format.grade(question, response)
        assert isinstance(grade, bool)
        if response_format.is_settled(question, response):
            assert response_format.grade(question, response + continuation) is grade
            answered = response_format.has_answer(question, response)
            assert response_format.has_answer(question, response + continuation) is answered
        if question.set == "squadv2":
            assert grade == grade_span(response, question.choices)


@PLENTY
@given(text=ANSWERS)
def test_boxes_of_any_text(text):
    for box in (first_box(text), last_box(text)):
        assert box is None or box in text
    assert first_box(rf"\boxed{{{text}}}") == text or "\\" in text or "{" in text or "}" in text


@settings(PLENTY, max_examples=400)
@given(response=st.one_of(pieces(LATEX_PIECES, 10), st.text(string.printable, max_size=30)))
def test_symbolic_grading_of_any_answer_ends_in_time(response):
    started = time.monotonic()
    for gold in ("7", r"\frac{1}{2}"):
        assert isinstance(grade_math(response, gold), bool)
        assert isinstance(grade_math(rf"\boxed{{{response}}}", gold), bool)
    assert time.monotonic() - started < 40  # four comparisons of at most five seconds, on a busy machine


def test_no_answer_is_executed(tmp_path):
    marker = tmp_path / "executed"
    touch = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    checker = SymbolicChecker()
    try:
        for wrap in (
            "{}",
            "${}$",
            r"\boxed{{{}}}",
            r"\text{{{}}}",
            r"x^{{{}}}",
            "lambda: {}",
            "[{} for _ in '1']",
            "{{{}}}",
        ):
            attack = wrap.format(touch)
            assert not grade_math(attack, "7")
            assert not checker.equal("7", attack)
            assert not checker.equal(attack, "7")
            for question in QUESTIONS:
                assert not ResponseFormat().grade(question, attack)
    finally:
        checker.close()
    assert not marker.exists()
