"""Final answers in LaTeX: extracting them from a response, and comparing them with the gold answer.

Model output is never evaluated as Python. LaTeX is parsed by math-verify's ANTLR grammar, in a helper process with hard
limits on time and memory: sympy can hang in C code (9^{9^{9}}), where neither a signal nor a thread can interrupt it,
and the grader must work from any thread.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import select
import subprocess
import sys
import threading
from pathlib import Path

_BOX = re.compile(r"\\boxed\s*\{")
_SOLUTION_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?P<brace>\{)?")
# What belongs to a box without braces: a fraction, a root, a command, or a number or word.
_BARE_ANSWER = re.compile(
    r"\\d?t?frac\s*(?:\d\s*\d|(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d))|\\sqrt\s*(?:\{[^{}]*\}|\d+)|\\[a-zA-Z]+(?:\{[^{}]*\})?"
    r"|[^\s{}$,\\]+(?:,\d{3}(?!\d))*(?:\\%)?"
)
# Answers that are longer or nested deeper than any gold answer of MATH (159 characters, depth 5) are compared as
# strings only: the parser's time grows fast with depth.
_MAX_LENGTH = 300
_MAX_DEPTH = 12


def first_box(text: str) -> str | None:
    r"""Content of the first closed \boxed{...} of `text`, braces balanced, or None when there is none.

    The first, not the last: answers are direct, and a base model continues with the next problem. A box that is never
    closed is not an answer.

    >>> first_box(r" \boxed{\frac{1}{2}} and \boxed{3}")
    '\\frac{1}{2}'
    """
    opening = _BOX.search(text)
    return None if opening is None else _closed(text, opening.end())


def last_box(text: str) -> str | None:
    r"""Content of the last \boxed{...} or \fbox{...} of `text`: the answer of a worked solution of MATH.

    A box without braces ends with its number, fraction or command.

    >>> last_box(r"so $x=\boxed{3}$ or rather $x=\boxed{\text{odd}}$.")
    '\\text{odd}'
    >>> last_box(r"so it is $\boxed 3.5$.")
    '3.5'
    """
    openings = list(_SOLUTION_BOX.finditer(text))
    if not openings:
        return None
    if openings[-1]["brace"]:
        return _closed(text, openings[-1].end())
    bare = _BARE_ANSWER.match(text, openings[-1].end())
    return (bare[0].rstrip(".,;:!?") or None) if bare else None


def _closed(text: str, start: int) -> str | None:
    """`text` from `start` to the brace that closes the group which is open there, or None when nothing closes it."""
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2  # \{ and \} are printed braces, not grouping
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:position]
        position += 1
    return None


def _candidate(response: str) -> str | None:
    """The answer that `response` gives: the first box, else the first line, else None."""
    boxed = first_box(response)
    if boxed is not None:
        return boxed.strip()
    if _BOX.search(response):
        return None
    return response.strip().split("\n", 1)[0].strip() or None


def _tidy(latex: str) -> str:
    """`latex` without spacing, $ signs, size commands, a final full stop, and the command around an answer in words."""
    tidy = latex.strip().rstrip(".").replace("\\$", "").replace("$", "").strip()
    if words := _WORDS.fullmatch(tidy):
        tidy = words[1].strip()
    tidy = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[!,; ]", "", tidy)
    tidy = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", tidy)
    # Spaces separate only between letters ("\pi r" is not "\pir").
    return re.sub(r"(?<![a-zA-Z])\s+|\s+(?![a-zA-Z])", "", tidy)


_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
_INTEGER = re.compile(r"[-+]?\d{1,30}")


def grade_math(response: str, answer: str) -> bool:
    r"""Whether `response` gives the same value as the LaTeX expression `answer`.

    The candidate is the content of the first closed \boxed{}, else the first line of the response. Equal
    strings and integers are decided at once, everything else by math-verify ("\frac12" equals "0.5").
    """
    candidate = _candidate(response)
    return candidate is not None and _same_value(answer, candidate)


def math_can_still_be_right(partial: str, answer: str) -> bool:
    r"""False once the first closed \boxed{} of `partial` differs from `answer`."""
    return first_box(partial) is None or grade_math(partial, answer)


@functools.lru_cache(maxsize=200_000)
def _same_value(answer: str, candidate: str) -> bool:
    """Whether two answers are equal; cached, because a search sees the same few answers thousands of times."""
    gold, given = _tidy(answer), _tidy(candidate)
    if gold == given:
        return True
    if not gold or not given:
        return False
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(given):
        return int(gold) == int(given)
    if len(given) > _MAX_LENGTH or _depth(given) > _MAX_DEPTH:
        return False
    return _checker().equal(_as_latex(answer), _as_latex(_after_announcement(candidate)))


def _depth(text: str) -> int:
    """Deepest nesting of brackets of any kind in `text`."""
    depth = deepest = 0
    for character in text:
        if character in "{[(":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "}])":
            depth -= 1
    return deepest


def _after_announcement(candidate: str) -> str:
    """The part of an unboxed response after "the answer is", if it has these words."""
    return re.split(r"\banswer\s*(?:is|:)\s*:?\s*", candidate, maxsplit=1, flags=re.IGNORECASE)[-1]


def _as_latex(text: str) -> str:
    r"""`text` as one LaTeX formula for math-verify, which reads text between dollar signs."""
    inner = re.sub(r"(?<!\\)\$", "", text.strip().rstrip(".")).strip()
    return f"${inner}$"


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

    def equal(self, gold: str, given: str) -> bool:
        """Whether math-verify finds the two formulas equal, within the time limit."""
        with self._lock:
            process = self._process
            # A forked child must not write to its parent's pipe.
            if process is None or process.poll() is not None or self._owner != os.getpid():
                process = self._start()
            try:
                process.stdin.write(json.dumps([gold, given]).encode() + b"\n")
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
