r"""The part of a response that holds its answer: boxes, "the answer is", what remains without thinking blocks."""

from __future__ import annotations

import re

# End-of-turn tokens that are decoded as text, and what comes after them.
_END_TOKEN = re.compile(
    r"</s>|<\|(?:im_end|eot_id|endoftext|end_of_text|end|eom_id|im_start|start_header_id)\|>|<end_of_turn>|<eos>"
)
_TAGS = "think|thinking|thought|reasoning|analysis|scratchpad"
_THINKING = re.compile(rf"<(?:{_TAGS})>", re.IGNORECASE)
_THINKING_BLOCK = re.compile(rf"<({_TAGS})>.*?</\1>", re.IGNORECASE | re.DOTALL)

_IS = (
    r"(?:\s*(?:is|are|be|would be|will be|should be|must be|was|equals?|est|ist|es|è|é|lautet|to|=|为|是|は|：|:)"
    r"(?![a-zA-Z]))"
)
ANNOUNCED = (
    r"(?:(?:final\s+|correct\s+|right\s+|best\s+)?(?:answer|solution|result|option|choice|label)"
    r"|r[ée]ponse(?:\s+(?:finale|correcte))?|bonne\s+r[ée]ponse|antwort|l[öo]sung|respuesta(?:\s+(?:final|correcta))?|risposta"
    r"|resposta|antwoord|odpowied[źz]|svar(?:et)?|vastaus|ответ|відповідь|cevap|jawaban|câu trả lời|đáp án|उत्तर|"
    r"答え|解答|正解|回答|答案|정답|답|الإجابة|الجواب|תשובה)"
)
_ANNOUNCEMENT = re.compile(
    rf"(?:\b|(?<=[\W_]))?{ANNOUNCED}(?![a-zA-Z])(?P<between>[^.\n:：=*]{{0,40}}?)\W{{0,3}}?{_IS}[\s:：*]*",
    re.IGNORECASE,
)
_MARKER = re.compile(r"(?m)^\s*#{2,}\s*(?=[^\s#])(?![A-Za-z][a-z]+\s)")
# A base model continues with a problem of its own: what it answers there is not the answer.
_NEXT_PROBLEM = re.compile(r"\n\s*(?:Problem|Question|Q|Passage|Exercise)\s*\d*\s*[:.]", re.IGNORECASE)
# Where an answer in prose ends.
_PROSE_END = re.compile(
    r",?\s+(?:because|since|as\s+(?:the|we|it|there|shown)|so\s+that|which|for\s+the|where)\b|\s+\((?:because|since)\b"
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z{])\s*")
_SOLUTION_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?P<brace>\{)?")
# What belongs to a box without braces: a fraction, a root, a command, or a number or word.
_BARE_ANSWER = re.compile(
    r"\\d?t?frac\s*(?:\d\s*\d|(?:\{[^{}]*\}|\d)\s*(?:\{[^{}]*\}|\d))|\\sqrt\s*(?:\{[^{}]*\}|\d+)|\\[a-zA-Z]+(?:\{[^{}]*\})?"
    r"|[^\s{}$,\\]+(?:,\d{3}(?!\d))*(?:\\%)?"
)
_ORDINARY_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_DISPLAY = re.compile(r"\\\[(.+?)\\\]|\$\$(.+?)\$\$", re.DOTALL)


def final_text(response: str) -> str | None:
    """`response` without thinking blocks and before its end token, or None where nothing remains.

    A block that is not closed goes on to the end. A closing tag alone ends nothing: the answer before it would
    already have been graded.

    >>> final_text("<think>A or C?</think> B</s>")
    '\\n B'
    """
    text = _THINKING_BLOCK.sub("\n", response)
    text = _THINKING.split(_END_TOKEN.split(text, maxsplit=1)[0], maxsplit=1)[0]
    return text if text.strip() else None


def _after_announcement(text: str) -> str:
    """`text` after "the answer is", "答案是" or "####", if one of these precedes the next problem; else all of it."""
    own = _NEXT_PROBLEM.split(text, maxsplit=1)[0]
    found = [
        match for match in (_ANNOUNCEMENT.search(own), _MARKER.search(own)) if match and own[match.end() :].strip()
    ]
    if not found:
        return text
    return own[min(found, key=lambda match: match.start()).end() :].strip()


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
    return _bare(text, openings[-1].end())


def _bare(text: str, start: int) -> str | None:
    r"""The answer of "\boxed 3.5" or "\boxed\frac{1}{2}" from `start` on."""
    match = _BARE_ANSWER.match(text, start)
    return (match[0].rstrip(".,;:!?") or None) if match else None


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


def answer_of(response: str) -> str | None:
    """The answer that `response` gives: the first box, else what it announces as its answer, else its first line."""
    text = final_text(response)
    if text is None:
        return None
    boxed = first_box(text)
    if boxed is not None:
        while (inner := first_box(boxed)) is not None:
            boxed = inner
        return boxed.strip()
    if _BOX.search(text):
        return None
    if opening := _BARE_BOX.search(text):
        return _bare(text, opening.end())
    return _unboxed(text)


def _unboxed(text: str) -> str | None:
    text = re.sub(r"</?answer>|\A\s*A(?:ns)?\s*:(?=\s)", " ", text).strip()
    if (display := _DISPLAY.match(text)) and not text[display.end() :].split("\n", 1)[0].strip(" .*"):
        return (display[1] or display[2]).strip()
    answer = _after_announcement(text)
    if display := _DISPLAY.match(answer):
        return (display[1] or display[2]).strip()
    line = _PROSE_END.split(answer.split("\n", 1)[0], maxsplit=1)[0]
    line = re.sub(r"(\*\*|__|`)(.+?)\1", r" \2 ", line).strip(" \t*_`")
    return line or None


def has_value(response: str) -> bool:
    r"""Whether `response` gives a closed box, or else a value rather than the beginning of a sentence.

    A value has at most two words of two letters and more, as in "12 square inches" and "June 20".

    >>> has_value(r"\frac{3}{4}"), has_value("Let the number be x. We have")
    (True, False)
    """
    answer, text = answer_of(response), final_text(response) or ""
    return answer is not None and (bool(_SOLUTION_BOX.search(text)) or len(_ORDINARY_WORD.findall(answer)) <= 2)


def has_settled_box(partial: str) -> bool:
    r"""Whether the first \boxed{} of a partial response is closed, so that its grade is final."""
    text = final_text(partial)
    return text is not None and first_box(text) is not None
