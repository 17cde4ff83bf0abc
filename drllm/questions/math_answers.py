"""Whether a final answer in LaTeX has the value of the gold answer.

Answers are brought to one spelling (`math_text`) and compared part by part (`math_parts`). Single expressions are
brought to the form that Math-Verify reads as it is meant (`math_expressions`): it adds the integer of "2 3/4" where it
should read a mixed number, multiplies nothing in "(2)(3)", and drops subscripts and capitals.

What only the values can tell goes to a helper process (`math_checker`); one answer in eight does.
"""

from __future__ import annotations

import atexit
import functools

from drllm.processes import helper_count
from drllm.questions.math_checker import CheckerPool
from drllm.questions.math_parts import Comparison
from drllm.questions.math_text import brackets, tidy
from drllm.questions.response_text import answer_of, has_settled_box

# Answers that are longer or nested deeper than any gold answer of MATH (159 characters, depth 5) are compared as
# strings only: the parser's time grows fast with depth.
_MAX_LENGTH = 300
_MAX_DEPTH = 12


def grade_math(response: str, answer: str) -> bool:
    r"""Whether `response` gives the same value as the LaTeX expression `answer`.

    The candidate is the content of the first closed \boxed{}, else what the response announces as its answer, else its
    first line. A thinking block before it is left out.
    """
    candidate = answer_of(response)
    return candidate is not None and _same_value(answer, candidate)


def math_can_still_be_right(partial: str, answer: str) -> bool:
    r"""False once the first closed \boxed{} of `partial` differs from `answer`."""
    return not has_settled_box(partial) or grade_math(partial, answer)


@functools.lru_cache(maxsize=200_000)
def _same_value(answer: str, candidate: str) -> bool:
    """Whether two answers are equal; cached, because a search sees the same few answers thousands of times."""
    if answer == candidate:
        return True
    if len(candidate) > _MAX_LENGTH or brackets(candidate) > _MAX_DEPTH:
        return False
    gold, given = tidy(answer), tidy(candidate)
    return bool(gold and given) and Comparison(_check).same(gold, given)


def _check(gold: str, given: str, mode: str) -> bool:
    return _checkers().equal(gold, given, mode)


@functools.cache
def _checkers() -> CheckerPool:
    """The helpers of this process; each starts with a comparison that finds the others busy."""
    checkers = CheckerPool(helper_count())
    atexit.register(checkers.close)
    return checkers
