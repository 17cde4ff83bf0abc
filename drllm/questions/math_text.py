r"""One spelling for LaTeX answers: "\dfrac{1}{2}", "½" and "$\frac12$" become the same text.

Nothing here changes a value. What the readers of values cannot read is compared as this text (`same_words`).
"""

from __future__ import annotations

import re
import unicodedata

from drllm.questions.math_tables import CHARACTERS, COMMANDS, FUNCTIONS, MONTHS

_TABLE = str.maketrans(CHARACTERS)
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿˣ", "0123456789+-nx", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_FULL_WIDTH = re.compile("[\uff01-\uff5e\u3000\u00a0\u2000-\u200a\u202f]")

_TEXT_COMMAND = (
    r"\\(?:text(?:bf|it|rm|normal|sf|tt|up|md|sl)?|mbox|hbox|math(?:rm|bf|it|sf|tt)|operatorname\*?|emph|mathop"
    r"|boldsymbol|bm|textbf|underline)(?![a-zA-Z])"
)
TEXT = re.compile(r"\\text\{([^{}]*)\}")
_SYMBOL_STYLE = re.compile(r"\\(?:mathbf|boldsymbol|bm|mathit)\s*\{((?:\\[a-z]+|[^{}\\])*)\}")
_NAMED_FUNCTIONS = "|".join(sorted({*FUNCTIONS, "gcd", "lcm", "max", "det"}))
_NAMED = re.compile(rf"\\text\{{\s*({_NAMED_FUNCTIONS})\s*\}}")
_SIZES = re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?(?=[^a-zA-Z]|\Z)")
_STYLES = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|bf|rm|it|bfseries|hfill|noindent|centering|Large|large)(?![a-zA-Z])"
)
_ROW_END = "\x00"  # stands for a double backslash meanwhile
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_WORD_COMMANDS = re.compile(rf"(?<![a-zA-Z\\])(sqrt|infinity|infty|pi|{_NAMED_FUNCTIONS})(?![a-zA-Z])")
# A comma before three digits separates thousands, where no space follows it.
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")


def tidy(latex: str) -> str:
    """`latex` in one spelling: no unicode signs, dollar signs, styles and sizes; words in \\text{}; single spaces.

    The dollar of a price stays, as ``\\$``. Spaces stay where they separate ("2 3/4", "1, 200").
    """
    text = _plain_characters(latex)
    text = re.sub(r"(?<!\\)\$|\\[()\[\]](?![a-zA-Z])|\*\*", "", _keep_row_ends(text))
    text = _SIZES.sub("", text)
    text = re.sub(r"\{\s*([,:])\s*\}|(,)\s*\\!", r"\1\2", text)
    text = re.sub(r"\\!", "", text)
    text = re.sub(r"\\[,;:> ]|~|\\q?quad(?![a-zA-Z])|\\(?:h|v)?space\*?\{[^{}]*\}|\\(?:thin|med|thick)space", " ", text)
    text = _STYLES.sub(" ", text)
    text = _SYMBOL_STYLE.sub(_symbol_or_word, text)
    text = re.sub(_TEXT_COMMAND + r"\s*", lambda match: "\\text", text)
    text = re.sub(r"\\text\{\s*\}", " ", _NAMED.sub(r"\\\1 ", text))
    text = TEXT.sub(_text_parts, text)
    text = _COMMAND.sub(_rename, text)
    text = re.sub(r"\\%|\\text\{\s*\\?%\s*\}", "%", text).replace(r"\&", "&").replace(r"\#", "#").replace(r"\_", "_")
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\\text\{\s*\^\\circ\s*\}", "°", text)
    text = re.sub(r"(?:\.\s*){3,}", r"\\ldots ", text)
    text = re.sub(r"(?<=\d)\s*x\s*(?=10\s*\^)", r"\\times ", text)
    text = re.sub(r"\^\s*(-\d+|\d{2,})", r"^{\1}", text)
    text = re.sub(r"(?<![a-zA-Z])([apAP])\.?\s?[mM]\.(?![a-zA-Z])", r"\1m", text)
    text = re.sub(r"\\\{\s*\\\}", r"\\emptyset ", text)
    text = re.sub(r"\\mathbb\s+(\w)", r"\\mathbb{\1}", text)
    text = re.sub(r"\\frac\s*(?:\{([^{}]*)\}|\b(\w))\s*(?:\{([^{}]*)\}|(\w))", r"\\frac{\1\2}{\3\4}", text)
    text = _WORD_COMMANDS.sub(_command_of_word, text)
    return _without_frame(" ".join(text.split())).replace(_ROW_END, r"\\")


def _keep_row_ends(text: str) -> str:
    return text.replace(_ROW_END, "").replace(r"\\", _ROW_END)


def _plain_characters(text: str) -> str:
    text = _FULL_WIDTH.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = _RAISED.sub(lambda match: f"^{{{''.join(_SUPERSCRIPTS[c] for c in match[0])}}}", text)
    text = _LOWERED.sub(lambda match: f"_{{{''.join(_SUBSCRIPTS[c] for c in match[0])}}}", text)
    text = _VULGAR.sub(_vulgar_fraction, text)
    text = re.sub(r"([√∛∜])\s*(?:\(([^()]*)\)|(\d+|\w))", r"\1{\2\3}", text)
    return re.sub("[\u200b-\u200f\u2060\ufeff\ufe0f]", "", text).translate(_TABLE)


def _vulgar_fraction(match: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{above}}}{{{below}}}" if below else match[0]


def _symbol_or_word(match: re.Match[str]) -> str:
    content = match[1].strip()
    return content if len(content) < 2 or content.startswith("\\") else rf"\text{{{content}}}"


def _text_parts(match: re.Match[str]) -> str:
    r"""\text{A and C} as \text{A} \text{ and } \text{C}."""
    parts = re.split(r"\s*(?:([,;])\s*(?:(and|or)\s)?|(?<=\s)(and|or)\s)\s*", match[1])
    if len(parts) == 1 or not all(part.strip() for part in parts[::4]):
        return match[0]
    return ", ".join(rf"\text{{{part}}}" for part in parts[::4])


def _rename(match: re.Match[str]) -> str:
    name = COMMANDS.get(match[1])
    if name is None:
        return match[0]
    return "\\" + name if name.isalpha() else name


def _command_of_word(match: re.Match[str]) -> str:
    inside = match.string.rfind(r"\text{", 0, match.start())
    if inside >= 0 and "}" not in match.string[inside : match.start()]:
        return match[0]  # a word of a text
    return "\\infty " if match[1] == "infinity" else "\\" + match[1] + " "


def _without_frame(text: str) -> str:
    """`text` without final punctuation and without braces around the whole."""
    while True:
        before = text
        text = text.strip().rstrip(".,;:").lstrip(":=,;").strip() if text not in (".", ",") else text
        text = text.strip('"`')
        if text.endswith("\\") and not text.endswith("\\\\"):
            text = text[:-1]
        if text.startswith("{") and closing(text, 0) == len(text) - 1 and not re.search(r"\\(?:over|choose)\b", text):
            text = text[1:-1]
        if text == before:
            return text


def closing(text: str, start: int) -> int:
    r"""Position of the bracket that closes the one at `start`, or -1; ``\{`` and ``\}`` do not group."""
    depth, position = 0, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2
            continue
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return position
        position += 1
    return -1


def brackets(text: str) -> int:
    """Deepest nesting of brackets of any kind in `text`."""
    depth = deepest = 0
    for character in text:
        if character in "{[(":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "}])":
            depth -= 1
    return deepest


_POINTS = re.compile(r"(?<![a-zA-Z\\])[A-Z]{3,}(?![a-zA-Z])")
_DAY_MONTH = re.compile(rf"\b(\d{{1,2}})(?:\s*of)?\s+({'|'.join(MONTHS)})\b")


def same_words(first: str, second: str) -> bool:
    r"""Whether two tidied answers are the same text: "\text{June } 20" is "June 20th", "\text{(C)}" is "C".

    Capitals count where no word is longer than two letters, and in names of points: "ABC" is not "abc".
    """
    one, other = as_words(first), as_words(second)
    if one != other and not any(_POINTS.search(TEXT.sub("", text)) for text in (first, second)):
        one, other = as_words(first, fold=True), as_words(second, fold=True)
    return one == other != ""


def as_words(tidied: str, fold: bool = False) -> str:
    """A tidied answer as text to compare, without marks; with `fold` words are lower case and dates in one order."""
    text = TEXT.sub(lambda match: f" {match[1]} ", tidied)
    text = re.sub(r"(?<=\d)\s*\^?\{?\s*(?:st|nd|rd|th)\b\s*\}?", "", text)
    if fold and re.search(r"(?<!\\)\b[a-zA-Z]{3,}", text):
        text = _DAY_MONTH.sub(r"\2 \1", text.casefold())
    text = re.sub(r"([_^])\s*\{\s*(\w)\s*\}", r"\1\2", text)
    text = text.strip().rstrip(".,;")
    text = text.strip("'") if text.startswith("'") else text
    text = re.sub(r"[\"`]|(?<!\d)\.|\.(?!\d)", "", text)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    if option := re.fullmatch(r"\(([A-Za-z])\)", text):
        return option[1]
    return text
