"""Graders: is this response a right answer? Shared by the search, the lm-eval tasks and the tables.

Three kinds of answer, three graders:

* `grade_label`: multiple choice by option label (ARC, CommonsenseQA),
* `grade_math`: a final answer in LaTeX, boxed or bare (DART),
* `grade_span`: a span of a passage, or "unanswerable" (SQuAD v2).

Each has a companion `*_can_still_be_right(partial)`, which says "no" only when no continuation of the
partial response could be graded as right, so that a rollout may end early without changing its reward.

Model output is never evaluated as Python. LaTeX is parsed by math-verify's ANTLR grammar, in a helper
process with hard limits on time and memory: sympy can hang in C code where neither a signal nor a thread
reaches it (9^{9^{9}}), and the grader must work from any thread.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import select
import string
import subprocess
import sys
import threading

# --------------------------------------------------------------------------------------------------------
# Multiple choice by label

# One word, together with what is glued to it: "A-frame", "D'accord", "3.5", "U.S.A" are single words, so that
# their parts are not mistaken for labels.
_WORD = re.compile(r"\w+(?:['’\-]\w+|\.\d+|\.\w\b)*")
# The longest look beyond a word that `_WORD` needs to know where the word ends (".x" and one more).
_WORD_LOOKAHEAD = 3
# Labels that are also English words or numbers: "A good answer", "I think", "3 apples" name no option, while
# "A because ..." and "1 is right" do.
_ALSO_A_WORD = re.compile(r"[AaIi]|\d+")
_MAY_FOLLOW = frozenset({"because", "since", "is", "as"})
_ARITHMETIC = tuple("%/+-*=^°$<>")
_NEXT_WORD = re.compile(r"[ \t]+([a-z]\w*)")
_ANNOUNCED = re.compile(r"\b(?:answer|option|choice|label)(?:\s+is)?\W{0,4}\Z", re.IGNORECASE)


def _find_label(text: str, labels: tuple[str, ...]) -> tuple[str | None, int]:
    """The label that `text` commits to and how many characters of `text` that decision needs.

    A decision that needs more characters than there are may still change when the text goes on.
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
    """False once `partial` has committed to a label other than `answer`, whatever may follow."""
    label, needed = _find_label(partial, labels)
    return label is None or label == answer or needed > len(partial.lstrip())


# --------------------------------------------------------------------------------------------------------
# A final answer in LaTeX

_BOX = re.compile(r"\\boxed\s*\{")
# What is longer or nested deeper than any gold answer of MATH (159 characters, depth 5) is compared as a
# string only: the grammar needs time that grows fast with depth.
_MAX_LENGTH = 300
_MAX_DEPTH = 12


def first_box(text: str) -> str | None:
    r"""Content of the first closed \boxed{...} of `text`, braces balanced, or None when there is none.

    The first, not the last: answers are direct, and what a base model writes after its answer is the next
    problem. A box that is opened and never closed is no answer.

    >>> first_box(r" \boxed{\frac{1}{2}} and \boxed{3}")
    '\\frac{1}{2}'
    """
    opening = _BOX.search(text)
    if opening is None:
        return None
    depth, position = 1, opening.end()
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2  # \{ and \} are printed braces, not grouping
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[opening.end() : position]
        position += 1
    return None


def _candidate(response: str) -> str | None:
    """What `response` offers as its answer: the first box, else its first line, else None."""
    boxed = first_box(response)
    if boxed is not None:
        return boxed.strip()
    if _BOX.search(response):
        return None
    return response.strip().split("\n", 1)[0].strip() or None


def _tidy(latex: str) -> str:
    """`latex` without what never changes its value: spacing, $ signs, size commands, a final full stop, and the command
    around an answer in words."""
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
    r"""False once a closed \boxed{} holds something else than `answer`; the first box decides."""
    return first_box(partial) is None or grade_math(partial, answer)


@functools.lru_cache(maxsize=200_000)
def _same_value(answer: str, candidate: str) -> bool:
    """`grade_math` of one pair, remembered: a search sees the same few answers thousands of times."""
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
    """The part after "the answer is", when a bare response begins that way."""
    return re.split(r"\banswer\s*(?:is|:)\s*:?\s*", candidate, maxsplit=1, flags=re.IGNORECASE)[-1]


def _as_latex(text: str) -> str:
    r"""`text` as one LaTeX formula for math-verify, which reads what stands between dollar signs."""
    inner = re.sub(r"(?<!\\)\$", "", text.strip().rstrip(".")).strip()
    return f"${inner}$"


class SymbolicChecker:
    """A helper process that compares LaTeX answers, replaced whenever one of them makes it hang or die.

    `timeout_s` bounds one comparison, from any thread. A comparison that does not end in time, or takes the
    helper down, counts as "not equal".
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
            # A forked child must not talk over its parent's pipe.
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
        command = [sys.executable, "-P", os.path.abspath(__file__)]
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
            raise RuntimeError("the helper process for symbolic grading did not start; is math-verify there?")
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
    """The helper of this process, started with the first comparison that needs it."""
    checker = SymbolicChecker()
    atexit.register(checker.close)
    return checker


def _serve(timeout_s: float, memory_bytes: int) -> None:
    """Main loop of the helper process: one JSON pair a line in, "1" or "0" out."""
    import faulthandler
    import logging
    import resource

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # LaTeX only: math-verify's other extraction hands text to sympy's parse_expr, which evaluates it.
    latex = (LatexExtractionConfig(boxed_match_priority=0),)
    soft_s = max(1, int(timeout_s) - 2)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may write where the replies go
    replies.write("ready\n")
    for line in sys.stdin:
        # A watchdog thread in C ends the process even if sympy hangs in C, also when the parent is gone.
        faulthandler.dump_traceback_later(timeout_s + 1, exit=True)
        try:
            gold, given = (
                parse(text, latex, fallback_mode="no_fallback", parsing_timeout=soft_s) for text in json.loads(line)
            )
            equal = bool(gold and given and verify(gold, given, timeout_seconds=soft_s))
        except (Exception, RecursionError, MemoryError):
            equal = False
        faulthandler.cancel_dump_traceback_later()
        replies.write("1\n" if equal else "0\n")


# --------------------------------------------------------------------------------------------------------
# A span of a passage

UNANSWERABLE = "unanswerable"


def normalise_span(text: str) -> str:
    """`text` as SQuAD compares it: lower case, without punctuation, articles and extra spaces."""
    text = "".join(" " if character in "-–—" else character for character in text.lower())
    text = "".join(character for character in text if character not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def _span(response: str) -> str:
    return normalise_span(response.lstrip().split("\n", 1)[0])


def grade_span(response: str, answers: tuple[str, ...]) -> bool:
    """Whether the first line of `response` is one of `answers`, both normalised as SQuAD does."""
    return _span(response) in {normalise_span(answer) for answer in answers}


def span_f1(response: str, answers: tuple[str, ...]) -> float:
    """Best word overlap (F1) of the first line of `response` with one of `answers`, in [0, 1]."""
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
    """False once the first line of `partial` is complete and is none of `answers`."""
    return "\n" not in partial.lstrip() or grade_span(partial, answers)


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))
