"""The option label that a response gives as its answer: one rule for letters and digits.

The first label counts that stands as a word of its own. A label that continues as ordinary text names no option ("A
good answer", "3 apples", "Vitamin D", "2 + 2 = 4"), and options that are named side by side ("A or B", "A/B") give
none.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator

from drllm.questions.response_text import ANNOUNCED, final_text

# Full-width forms and the punctuation of East Asian texts, one character each.
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    ord(wide): narrow for wide, narrow in zip("\u3000。、「」『』【】〔〕《》", " .,()()()()()", strict=True)
}
# Letters and digits of scripts that separate words: "答案是B" contains the word "B".
_LETTER = r"[^\W_\u1100-\u11ff\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff]"
# One word with everything joined to it: "A-frame", "D'accord", "3.5" and "U.S.A" are single words, so that their
# parts are not mistaken for labels.
_WORD = re.compile(rf"{_LETTER}+(?:['’\-_]{_LETTER}+|\.\d+|\.{_LETTER}(?!{_LETTER}))*")
# Characters after a word that `_WORD` needs to see to decide where the word ends (".x" and one more).
_WORD_LOOKAHEAD = 3
# Labels that are also English words or numbers, and the words that may follow them as labels.
_ALSO_A_WORD = re.compile(r"[AaIi]|\d+")
_NEXT_WORD = re.compile(r"[ \t]+([a-z]\w*)")
_MAY_FOLLOW = frozenset(
    ["because", "since", "is", "as", "was", "would", "could", "should", "must", "might", "seems", "has", "isn't"]
)
_MAY_FOLLOW_I = frozenset(["because", "since", "is", "as"])  # "I would say B"
# Words that a letter or a number belongs to, where they stand before it.
_OF_A_NAME = re.compile(
    r"\b(?:vitamins?|hepatitis|plan|type|grade|group|class|team|point|figure|table|part|side|step|stage|phase|chapter"
    r"|section|page|question|problem|day|year|level|not|isn't)[ \t]+\Z",
    re.IGNORECASE,
)
_ANNOUNCED = re.compile(
    rf"(?:\b|(?<=\W))?{ANNOUNCED}(?:\s*(?:is|would be|must be|should be|est|ist|es|è|é|は|是|为|為|은|는))?"
    r"(?:\W{0,8}(?:(?:the\s+)?(?:option|choice|letter|label|number|opción|lettre)))?\W{0,8}\Z",
    re.IGNORECASE,
)
# Arithmetic around a number. "=4" and "<b>4</b>" are none.
_OPERATION_BEFORE = re.compile(r"(?:(?:\d|[)%]|(?<![\w<])(?<!</)\w)[ \t]*[-+*/^=<>][ \t]*|(?<![-\w])[-+]|[€£¥])\Z")
_OPERATION_AFTER = re.compile(r"[ \t]*(?:[%°€£]|[-+*/^=<>][ \t]*[\d(\\])|[:,]\d")
_MARKUP = r"[ \t*_`\"'()\[\]{}$]*"
_OR = r"(?:or|and|oder|und|ou|et|или|и)(?![\w'’-])"
_ALTERNATIVE = re.compile(
    rf"{_MARKUP}(?P<connector>(?:,\s*)?{_OR}|[/&|]|或者?|和|か|または|,(?={_MARKUP}{_LETTER}{_MARKUP}(?:\.?\s*\Z|\n|,|{_OR})))?"
    rf"(?(connector){_MARKUP}(?:(?:maybe|perhaps|possibly|even|else|option|choice|answer)[ \t]+)*{_MARKUP})"
    rf"(?P<word>{_LETTER}*)"
)


def find_label(response: str, labels: tuple[str, ...]) -> tuple[str | None, bool]:
    """(the label that `response` gives, whether every continuation of the response gives the same label)."""
    text = (final_text(response) or "").translate(_NARROW).lstrip()
    lower = {label.lower(): label for label in labels}
    line, newline, _ = text.partition("\n")
    alone = line.strip(string.punctuation + string.whitespace)
    if alone not in labels and alone in lower:
        return lower[alone], bool(newline)
    skipped_until = 0
    for start, end, label in _words_that_are_labels(text, labels, lower):
        if start < skipped_until:
            continue
        alternatives_end, context_end = _alternatives(text, end, labels)
        if alternatives_end:
            skipped_until = alternatives_end
        elif _stands_for_an_option(text, start, end):
            return label, max(end + _WORD_LOOKAHEAD, context_end) <= len(text)
    return None, False


def _words_that_are_labels(text: str, labels: tuple[str, ...], lower: dict[str, str]) -> Iterator[tuple[int, int, str]]:
    """(start, end, label) of each word that is a label, in lower case only after "the answer is"."""
    for word in _WORD.finditer(text):
        token = word.group()
        if token in labels:
            yield word.start(), word.end(), token
        elif token in lower and _ANNOUNCED.search(text, 0, word.start()):
            yield word.start(), word.end(), lower[token]


def _alternatives(text: str, end: int, labels: tuple[str, ...]) -> tuple[int, int]:
    """(where a chain such as "or C or D" after `end` ends, else 0; number of characters that decide it)."""
    found = 0
    while True:
        match = _ALTERNATIVE.match(text, end)
        word = _WORD.match(text, match.start("word"))
        if match["connector"] is None:
            return found, match.end() + (1 if text[match.start("word") :][:1] != "," else 12)
        if word is None or word.group() not in labels:
            return found, match.end() + _WORD_LOOKAHEAD
        found = end = word.end()


def _stands_for_an_option(text: str, start: int, end: int) -> bool:
    """Whether the label at `start` names an option: it is no article, no number of things and no part of a name."""
    token, before = text[start:end], text[:start]
    is_announced = bool(_ANNOUNCED.search(before))
    if _OF_A_NAME.search(before) and not is_announced:
        return False
    if not _ALSO_A_WORD.fullmatch(token):
        return True
    following = _NEXT_WORD.match(text, end)
    if following and following.group(1) not in (_MAY_FOLLOW_I if token in "Ii" else _MAY_FOLLOW):
        return False
    if not token.isdigit():
        return True
    if before.endswith("$") and text[end : end + 1] not in ("", "$"):
        return False  # a price; "$4$" is a formula
    return not _OPERATION_AFTER.match(text, end) and (is_announced or not _OPERATION_BEFORE.search(before))
