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

from drllm.questions.math_answers import grade_math, math_can_still_be_right
from drllm.questions.sets import SETS, Question


def grade(question: Question, response: str) -> bool:
    """Whether `response`, the text after the prompt, is a right answer to `question`."""
    kind = SETS[question.set].kind
    if kind == "choice":
        return grade_label(response, question.labels, question.answer)
    if kind == "math":
        return grade_math(response, question.answer)
    return grade_span(response, question.choices)


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

# One word with everything joined to it: "A-frame", "D'accord", "3.5" and "U.S.A" are single words, so that their
# parts are not mistaken for labels.
_WORD = re.compile(r"\w+(?:['’\-]\w+|\.\d+|\.\w\b)*")
# Characters after a word that `_WORD` needs to see to decide where the word ends (".x" and one more).
_WORD_LOOKAHEAD = 3
# Labels that are also English words or numbers: "A good answer", "I think", "3 apples" name no option, while
# "A because ..." and "1 is right" do.
_ALSO_A_WORD = re.compile(r"[AaIi]|\d+")
_MAY_FOLLOW = frozenset({"because", "since", "is", "as"})
_ARITHMETIC = tuple("%/+-*=^°$<>")
_NEXT_WORD = re.compile(r"[ \t]+([a-z]\w*)")
_ANNOUNCED = re.compile(r"\b(?:answer|option|choice|label)(?:\s+is)?\W{0,4}\Z", re.IGNORECASE)


def _find_label(text: str, labels: tuple[str, ...]) -> tuple[str | None, int]:
    """The label that `text` gives as its answer, and the number of characters on which that decision depends.

    A decision that depends on more characters than `text` has may change when the text continues.
    """
    text = text.lstrip()
    line, newline, _ = text.partition("\n")
    lower = {label.lower(): label for label in labels}
    alone = line.strip(string.punctuation + string.whitespace)
    if alone not in labels and alone in lower:
        return lower[alone], len(line) + 1 if newline else len(text) + 1
    for word in _WORD.finditer(text):
        token, end = word.group(), word.end()
        if token in labels:
            label = token
        elif token in lower and _ANNOUNCED.search(text, 0, word.start()):
            label = lower[token]
        else:
            continue
        needed = end + _WORD_LOOKAHEAD
        if _ALSO_A_WORD.fullmatch(token):
            following = _NEXT_WORD.match(text, end)
            if following and following.group(1) not in _MAY_FOLLOW:
                continue
            if token.isdigit() and (text[end : end + 1] in _ARITHMETIC or text[: word.start()][-1:] in _ARITHMETIC):
                continue
            rest = text[end:]
            blank = len(rest) - len(rest.lstrip(" \t"))
            needed = max(needed, following.end() + 1 if following else end + blank + 1)
        return label, needed
    return None, len(text) + 1


def extract_label(response: str, labels: tuple[str, ...]) -> str | None:
    """The first of `labels` that `response` gives as its answer, or None.

    Understands "B", " B.", "(B)", "**B**", "B because ...", "The answer is B", "Option b" and a lone "b". A
    label that is an English word or a number counts only where it does not continue as ordinary text: "A good
    answer" and "3 apples" name no option.

    >>> extract_label(" B.", ("A", "B", "C"))
    'B'
    >>> extract_label("A good answer is (C)", ("A", "B", "C"))
    'C'
    """
    return _find_label(response, labels)[0]


def grade_label(response: str, labels: tuple[str, ...], answer: str) -> bool:
    """Whether the first label that `response` gives is `answer`."""
    return extract_label(response, labels) == answer


def label_can_still_be_right(partial: str, labels: tuple[str, ...], answer: str) -> bool:
    """False once `partial` gives a label other than `answer`, regardless of its continuation."""
    label, needed = _find_label(partial, labels)
    return label is None or label == answer or needed > len(partial.lstrip())


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


def span_f1(response: str, answers: tuple[str, ...]) -> float:
    """Word overlap (F1, in [0, 1]) of the first line of `response` with the closest of `answers`."""
    given = _span(response).split()
    best = 0.0
    for answer in answers:
        gold = normalise_span(answer).split()
        common = sum(min(given.count(word), gold.count(word)) for word in set(given))
        if given == gold:
            best = 1.0
        elif common:
            best = max(best, 2 * common / (len(given) + len(gold)))
    return best


def span_can_still_be_right(partial: str, answers: tuple[str, ...]) -> bool:
    """False once the first line of `partial` is complete and not among `answers`."""
    return "\n" not in partial.lstrip() or grade_span(partial, answers)
