"""Graders: whether a response is right. Shared by the search, the lm-eval tasks and the tables.

There is one grader per kind of answer:

* `grade_label`: multiple choice by option label (ARC, CommonsenseQA),
* `grade_math`: a final answer in LaTeX, boxed or bare (DART), in `drllm.questions.math_answers`,
* `grade_span`: a span of a passage, or "unanswerable" (SQuAD v2).

Each has a companion `*_can_still_be_right(partial)`, which is False only if no continuation of the partial response
can be graded as right. Rollouts end early on it without a change of their reward.
"""

from __future__ import annotations

import re
import string

from drllm.questions.labels_of_options import find_label
from drllm.questions.math_answers import grade_math, math_can_still_be_right
from drllm.questions.response_text import has_value
from drllm.questions.sets import SETS, Question

# Goes up by one with every change that grades a response differently; labels and results record it.
GRADER_VERSION = 4


def grade(question: Question, response: str) -> bool:
    """Whether `response`, the text after the prompt, is a right answer to `question`."""
    kind = SETS[question.set].kind
    if kind == "choice":
        return grade_label(response, question.labels, question.answer)
    if kind == "math":
        return grade_math(response, question.answer)
    return grade_span(response, question.choices)


def has_answer(question: Question, response: str) -> bool:
    """Whether `response` holds an answer to grade: a label; a box or a plain value; a line of text for a span."""
    kind = SETS[question.set].kind
    if kind == "choice":
        return extract_label(response, question.labels) is not None
    return has_value(response) if kind == "math" else bool(_span(response))


def can_still_be_right(question: Question, partial_response: str) -> bool:
    """False only if no continuation of `partial_response` passes `grade`; used to end rollouts early."""
    kind = SETS[question.set].kind
    if kind == "choice":
        return label_can_still_be_right(partial_response, question.labels, question.answer)
    if kind == "math":
        return math_can_still_be_right(partial_response, question.answer)
    return span_can_still_be_right(partial_response, question.choices)


# --------------------------------------------------------------------------------------------------------
# Multiple choice by label


def extract_label(response: str, labels: tuple[str, ...]) -> str | None:
    """The first of `labels` that `response` gives as its answer, or None.

    Understands "B", " B.", "(B)", "**B**", "$4$", "B because ...", "The answer is B", "答案是B", "Option b" and a lone
    "b", after a thinking block, too. Labels that continue as ordinary text ("A good answer", "3 apples") name no
    option, and neither do alternatives ("A or B").

    >>> extract_label(" B.", ("A", "B", "C"))
    'B'
    >>> extract_label("A good answer is (C)", ("A", "B", "C"))
    'C'
    """
    return find_label(response, labels)[0]


def grade_label(response: str, labels: tuple[str, ...], answer: str) -> bool:
    """Whether the first label that `response` gives is `answer`."""
    return extract_label(response, labels) == answer


def label_can_still_be_right(partial: str, labels: tuple[str, ...], answer: str) -> bool:
    """False once `partial` gives a label other than `answer`, regardless of its continuation."""
    label, is_final = find_label(partial, labels)
    return label is None or label == answer or not is_final


# --------------------------------------------------------------------------------------------------------
# A span of a passage


def normalise_span(text: str) -> str:
    """`text` normalised as in SQuAD: lower case, without punctuation, articles and extra spaces."""
    text = "".join(" " if character in "-–—" else character for character in text.lower())
    text = "".join(character for character in text if character not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def _span(response: str) -> str:
    return normalise_span(response.lstrip().split("\n", 1)[0])


def grade_span(response: str, answers: tuple[str, ...]) -> bool:
    """Whether the first line of `response` is one of `answers`, both normalised as SQuAD does."""
    return _span(response) in {normalise_span(answer) for answer in answers}


def span_can_still_be_right(partial: str, answers: tuple[str, ...]) -> bool:
    """False once the first line of `partial` is complete and not among `answers`."""
    return "\n" not in partial.lstrip() or grade_span(partial, answers)
