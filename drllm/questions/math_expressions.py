"""Single expressions: those that Math-Verify reads as they are meant, in the spelling that it reads so."""

from __future__ import annotations

import re
from fractions import Fraction

from drllm.questions.math_tables import FUNCTIONS
from drllm.questions.math_text import THOUSANDS

_SMALL = r"\s*(?:\{\s*(\d+)\s*\}|(\d))"
_MIXED = re.compile(rf"(?<![\w.}}^/)])(\d+)\s*\\frac{_SMALL}{_SMALL}")
_MIXED_PLAIN = re.compile(r"(?<![\w.}^/)])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.])")
_REPEATING = re.compile(r"(\d*)\.(\d*)\s*\\(?:overline|bar)\s*\{?\s*(\d+)\s*\}?")
_UNREADABLE = re.compile(
    r"\d\s+[\d.]|[A-Za-z]\s*\d|\d\s*_|'|\"|[?;:&@#~`%$°]|(?<![a-zA-Z\\])[a-zA-Z]{3}|"
    r"(?<![a-zA-Z\\])[A-Z]{2}|\^[\w]\s+\w|\}\s*\d"
)
# "1/2x" is x/2 to some and 1/(2x) to others.
_LOOSE_SLASH = re.compile(
    r"/\s*(?:[\d.]+|[a-zA-Z]|\\pi|\\sqrt\s*(?:\[\w\])?\s*(?:\{[^{}]*\}|\w))\s*(?:[a-zA-Z(]|\\(?:pi|sqrt|frac)(?![a-zA-Z]))"
)
_SYMBOL = re.compile(r"\\[a-zA-Z]+(?:_(?:\{[^{}]*\}|\w))?|[A-Za-z](?:_\s*(?:\{[^{}]*\}|\w))?")
LETTERS = "xyzabcfghjkmnpqrstuvw"


def readable(text: str) -> str | None:
    """An expression in a form that Math-Verify reads as it is meant, or None where it would read another one."""
    text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d.])", lambda match: match[0].replace(" ", ""), text)
    text = _MIXED.sub(lambda m: rf"({m[1]}+\frac{{{m[2] or m[3]}}}{{{m[4] or m[5]}}})", text)
    text = _MIXED_PLAIN.sub(r"(\1+\\frac{\2}{\3})", text)
    text = _REPEATING.sub(lambda m: _latex(_repeating(*m.groups())), text)
    text = re.sub(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})(?!\w)", r"\1\\cdot 10^{\2}", text)
    if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        text = re.sub(r"(\d+)°", r"(\\frac{\1\\pi}{180})", text)
    text = re.sub(r"\d*\.\d+|\d+\.(?!\d)", lambda m: _latex(Fraction(m[0].rstrip("."))), text)
    text = re.sub(r"\\sqrt\s+\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"([\w)}])\s*(?=\()|(?<=\))\s*(?=[\w\\])", _product, text)
    text = re.sub(r"(\d)\s*(?=\\(?:frac|sqrt))", r"\1\\cdot ", text)
    if re.search(r"\\(?:text|ldots|begin)", text) or _LOOSE_SLASH.search(text) or not text.strip():
        return None
    text = re.sub(r"\\sqrt\s*(\[\d+\])\s*(\w)", r"\\sqrt\1{\2}", text)
    if re.search(r"\^\s*\w\s*\d", text):
        return None
    bare = re.sub(r"\\log\s*_\s*(?:\{[^{}]*\}|\w)", "*", text)
    bare = re.sub(r"\\[a-zA-Z]+\s*(?:\d\s*\d(?!\d)|\{[^{}]*\}\s*\d(?!\d))?|\^\s*(?:\d|\{)", "*(", bare)
    return None if _UNREADABLE.search(re.sub(r"\s*([-+*/^()={}])\s*", r"\1", bare)) else text


def _product(match: re.Match[str]) -> str:
    before = match.string[: match.end(1)] if match[1] else ""
    if match[1] and re.search(r"(?:\\(?!pi)[a-zA-Z]+(?:\^\s*\w)?|\}|_\w|(?<!\\p)[a-zA-Z])\Z", before):
        return match[0]  # a function and its argument, or a group
    if re.match(r"\\(?:cdot|times|pm|mp|right|cup|in|le|ge)", match.string[match.end() :]):
        return match[0]
    return f"{match[1] or ''}\\cdot "


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    nines = 10 ** len(period) - 1
    return Fraction(int(whole + fixed or "0") * nines + int(period), nines * 10 ** len(fixed))


def _latex(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def fraction(text: str) -> Fraction | None:
    """The value of a whole number or a fraction of two, else None."""
    plain = re.sub(r"\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))", r"\1\2/\3\4", text.replace(" ", ""))
    if not re.fullmatch(r"[-+]?\d{1,300}(?:/0*[1-9]\d{0,300})?", plain):
        return None
    return Fraction(plain)


def rounds_to(first: Fraction, second: Fraction, gold: str, given: str) -> bool:
    """Whether one is a decimal with at least 6 digits of the other, whose own decimals never end."""
    for value, decimal, text in ((first, second, given), (second, first, gold)):
        match = re.fullmatch(r"-?(\d*)\.(\d+)", text)
        below = value.denominator
        while below % 2 == 0 or below % 5 == 0:
            below //= 2 if below % 2 == 0 else 5
        if match and below > 1 and len(match[2]) >= 6 and len((match[1] + match[2]).lstrip("0")) >= 6:
            scaled = abs(value) * 10 ** len(match[2])
            return abs(decimal) * 10 ** len(match[2]) in (int(scaled), int(scaled + Fraction(1, 2)))
    return False


def renamed(text: str, names: dict[str, str]) -> str:
    """`text` with one small letter for each symbol: Math-Verify drops subscripts and the difference to capitals."""

    def letter(match: re.Match[str]) -> str:
        symbol = match[0].replace(" ", "").replace("{", "").replace("}", "")
        if (command := re.match(r"\\([a-z][a-zA-Z]*)", symbol)) and ("_" not in symbol or command[1] in FUNCTIONS):
            return match[0]
        if symbol in ("e", "i"):
            return match[0]
        return names.setdefault(symbol, f" {LETTERS[min(len(names), len(LETTERS) - 1)]} ")

    return _SYMBOL.sub(letter, text)
