"""The helper process of `SymbolicChecker`: compares pairs of LaTeX expressions. It is started by its path.

Math-Verify parses; the values are compared here, since its own comparison rounds to 6 decimal places.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import sys
import time

import sympy
from math_verify import LatexExtractionConfig, parse, verify

DIGITS = 150
# Values for the variables: of both signs, and related by no simple equation.
POINTS = ((17, 23, 7), (-29, 13, 11), (5, 37, -19), (-3, 41, -2))


def same(first: sympy.Basic, second: sympy.Basic) -> bool:
    """Whether two expressions are the same rational number, or equal to 130 digits at every point."""
    if not (isinstance(first, sympy.Expr) and isinstance(second, sympy.Expr)):
        return bool(verify([first], [second], strict=True, timeout_seconds=None))
    first, second = (
        part.subs({s: sympy.I for s in part.free_symbols if s.name == "i"}).doit() for part in (first, second)
    )
    if first == second:
        return True
    if first.is_Rational and second.is_Rational:
        return False
    return all(ratio == 1 for ratio in ratios(first, second))


def ratios(first: sympy.Expr, second: sympy.Expr) -> list[sympy.Expr | None]:
    """`first` / `second` at the points where both have a value, rounded to 130 digits; None: not computable."""
    found: list[sympy.Expr | None] = []
    names = sorted(first.free_symbols | second.free_symbols, key=str)
    for start, factor, shift in POINTS if names else POINTS[:1]:
        values = {name: sympy.Rational(start * (n + 1) + shift, factor + 2 * n) for n, name in enumerate(names)}
        one, other = (sympy.N(part.subs(values), DIGITS) for part in (first, second))
        if not (one.is_number and other.is_number and one.is_finite and other.is_finite):
            continue
        if one == 0 or other == 0:
            found.append(sympy.Integer(1) if sympy.simplify(first - second) == 0 else None)
        elif abs(one / other - 1) < sympy.Float(10, DIGITS) ** -130:
            found.append(sympy.Integer(1))
        else:
            found.append(sympy.N(one / other, 100))
    return found if len(found) >= min(2, len(names) + 1) else [None]


def proportional(first: sympy.Expr, second: sympy.Expr, positive: bool) -> bool:
    """Whether `first` is `second` times a number other than 0, for `positive` above 0."""
    if first.free_symbols != second.free_symbols or not first.free_symbols:
        return False
    found = ratios(first, second)
    if any(ratio is None or (positive and not ratio > 0) for ratio in found):
        return False
    return all(abs(ratio / found[0] - 1) < 1e-60 for ratio in found)


def compare(gold: str, given: str, mode: str) -> bool:
    """Whether two formulas agree; `mode` is "value", "equation" or "inequality"."""
    # LaTeX only: math-verify's other extraction hands text to sympy's parse_expr, which evaluates it.
    latex = (LatexExtractionConfig(boxed_match_priority=0),)
    parsed = [parse(f"${t}$", latex, fallback_mode="no_fallback", parsing_timeout=None) for t in (gold, given)]
    if not all(parsed) or any(isinstance(found[0], str) for found in parsed):
        return False
    first, second = (found[0] for found in parsed)
    if mode == "value":
        return same(first, second)
    return proportional(first, second, mode == "inequality")


def limit_cpu_time(timeout_s: float) -> None:
    """From now on `TimeoutError` after `timeout_s` of CPU time, and the end of the process a second later.

    The timer ends what runs Python, the kernel's limit what hangs in C, also when the parent is gone. Neither counts
    the time that other processes take from this one: a grade must not depend on the load of the machine.
    """
    signal.setitimer(signal.ITIMER_PROF, timeout_s)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + timeout_s) + 1, most))


def _out_of_time(_signal: int, _frame: object) -> None:
    raise TimeoutError


def serve(timeout_s: float, memory_bytes: int) -> None:
    """Reads one JSON list [gold, given, mode] per line, and writes "1" if they agree, else "0"."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGPROF, _out_of_time)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may write where the replies go
    compare("x+1", "1+x", "value")  # slow the first time
    replies.write("ready\n")
    for line in sys.stdin:
        try:
            limit_cpu_time(timeout_s)
            gold, given, mode = json.loads(line)
            equal = compare(gold, given, mode)
        except (Exception, RecursionError, MemoryError):
            equal = False
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write("1\n" if equal else "0\n")


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
