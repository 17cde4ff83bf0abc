"""Whether a final answer in LaTeX has the value of the gold answer.

Answers are brought to one spelling (`math_text`) and compared part by part (`math_parts`). Single expressions are
brought to the form that Math-Verify reads as it is meant (`math_expressions`): it adds the integer of "2 3/4" where it
should read a mixed number, multiplies nothing in "(2)(3)", and drops subscripts and capitals.

Model output is never evaluated as Python. LaTeX is parsed by Math-Verify's ANTLR grammar, in a helper process with hard
limits on time and memory: sympy can hang in C code (9^{9^{9}}), where neither a signal nor a thread can interrupt it,
and the grader must work from any thread.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import subprocess
import sys
import threading
from pathlib import Path

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
    return _checker().equal(gold, given, mode)


class SymbolicChecker:
    """A helper process that compares LaTeX answers. It is replaced when a comparison makes it hang or die.

    A comparison that takes longer than `timeout_s`, or ends the helper, counts as "not equal". May be used from any
    thread.
    """

    def __init__(self, timeout_s: float = 5.0, memory_bytes: int = 4 << 30) -> None:
        self.timeout_s = timeout_s
        self.memory_bytes = memory_bytes
        self.timeouts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def equal(self, gold: str, given: str, mode: str = "value") -> bool:
        """Whether two LaTeX expressions agree, within the time limit; see `math_server.compare`."""
        with self._lock:
            process = self._process
            # A forked child must not write to its parent's pipe.
            if process is None or process.poll() is not None or self._owner != os.getpid():
                process = self._start()
            try:
                process.stdin.write(json.dumps([gold, given, mode]).encode() + b"\n")
                process.stdin.flush()
                reply = self._read_line(process, self.timeout_s)
            except BrokenPipeError:
                reply = None
            if reply is None:
                self.timeouts += 1
                self._kill()
                return False
            return reply == b"1"

    def close(self) -> None:
        """End the helper process, if this process started one."""
        with self._lock:
            self._kill()

    def _start(self) -> subprocess.Popen[bytes]:
        # -P keeps this file's folder off the helper's module path.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_server.py"))]
        limits = [str(self.timeout_s), str(self.memory_bytes)]
        self._process = subprocess.Popen(
            command + limits,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self._owner = os.getpid()
        if self._read_line(self._process, 120.0) != b"ready":
            self._kill()
            raise RuntimeError("the helper process for symbolic grading did not start; is math-verify installed?")
        return self._process

    @staticmethod
    def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
        """One line of the helper, which writes each line at once, or None after `timeout_s` or at its end."""
        readable, _, _ = select.select([process.stdout], [], [], timeout_s)
        return process.stdout.readline().strip() or None if readable else None

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@functools.cache
def _checker() -> SymbolicChecker:
    """The helper of this process; it starts with the first comparison."""
    checker = SymbolicChecker()
    atexit.register(checker.close)
    return checker
