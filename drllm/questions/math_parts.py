r"""Answers part by part: lists, sets, points, intervals, equations, ratios, bases, units; values are left to a checker.

What no rule and not the checker can read is compared as text, never as another value.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from drllm.questions.math_expressions import LETTERS, fraction, readable, renamed, rounds_to
from drllm.questions.math_tables import (
    BASE_WORDS,
    CURRENCIES,
    FILLERS,
    MULTIPLES,
    NO_UNITS,
    NUMBER_WORDS,
    UNITS,
)
from drllm.questions.math_text import TEXT, THOUSANDS, same_words

# (gold, given, "value" | "equation" | "inequality") -> whether two LaTeX expressions agree.
Checker = Callable[[str, str, str], bool]
# low bound, high bound (None: infinite), whether the bounds belong to the interval.
Interval = tuple[str | None, str | None, bool, bool]

_BRACKET = re.compile(
    r"(?P<opening>\\[{]|\\langle(?![a-zA-Z])|\\begin\{[^{}]*\}|[(\[{])|(?P<closing>\\[}]|\\rangle(?![a-zA-Z])|\\end\{[^{}]*\}|[)\]}])"
)
_SEPARATOR = re.compile(
    r"\s*(?:[,;]\s*)?(?:\\text\{\s*,?\s*(and|or)\s*\}|(?<![a-zA-Z\\])(and|or)(?![a-zA-Z])|[,;])\s*", re.IGNORECASE
)
_RELATION = re.compile(r"\s*(\\(?:le|ge|ne|in|approx)(?![a-zA-Z])|<=|>=|<|>|=)\s*")
_TURNED = {">": "<", r"\ge": r"\le", ">=": r"\le", "<=": r"\le"}
_NAME = re.compile(
    r"[A-Z]{2,3}|[a-z]\(\d+\)|m?\s*\\angle\s*[A-Z]+|\((?:[a-z]|\\[a-z]+)(?:,\s*(?:[a-z]|\\[a-z]+))+\)|[A-Z][a-z]+"
    r"|(?:\\text\{)?[A-Za-z](?:'|_\{?\w+\}?)?(?:\([a-z]\))?\}?|\\[a-z]{2,7}|\\text\{[^{}\d]*\}"
)
_PERCENT = re.compile(r"(.*?\d.*?)\s*(?:%|\\text\{\s*%?\s*(?:percent|per cent)?\s*\}|percent|per cent)")
_WORDS_AT_END = re.compile(
    r"(?P<core>.*?(?:[\d)}\]!]|\\pi))\s*(?P<words>(?:(?:\\text\{[^{}]*\}|(?<![a-zA-Z\\_^])[A-Za-z]{2,}\.?|(?<=/)[hs])[\s/]*)+)"
    r"(?:\^\s*\{?\s*(?P<power>[23])\s*\}?)?",
    re.DOTALL,
)
_BASED = re.compile(
    r"\(?([0-9A-Z]*\d[0-9A-Z]*)\)?\s*(?:_\s*\{?\s*\(?(\w+)\)?\s*\}?|\(?\s*,?\s*(?:in\s+)?base\s*[-\s]?(\w+)\s*\)?)",
    re.I,
)
_MATRIX = re.compile(
    r"([(\[|]?)\s*\\begin\{([pbvVB]?(?:small)?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\2\}\s*[)\]|]?", re.DOTALL
)
_EMPTY = re.compile(r"\\emptyset|(?:\\text\{\s*)?(?:the )?empty set\s*\}?", re.IGNORECASE)
_ALL = re.compile(r"\\mathbb\{R\}|\(-\\infty,\s*\\infty\)|(?:\\text\{\s*)?all (?:real numbers|reals)\s*\}?")


def outside(text: str) -> list[bool]:
    """For each character whether it stands outside all brackets."""
    found, depth, last = [], 0, 0
    for match in _BRACKET.finditer(text):
        found += [depth <= 0] * (match.start() - last) + [False] * (match.end() - match.start())
        depth += 1 if match["opening"] else -1
        last = match.end()
    return found + [depth <= 0] * (len(text) - last)


def split(text: str, pattern: re.Pattern[str], has_thousands: bool = True) -> tuple[list[str], list[str]]:
    """(parts between separators outside brackets, the separators)."""
    top = outside(text)
    kept = [match.span() for match in THOUSANDS.finditer(text)] if has_thousands else []
    parts, separators, start = [], [], 0
    for match in pattern.finditer(text):
        place = next((i for i in range(match.start(), match.end()) if not text[i].isspace()), match.start())
        if top[place] or (text[place] == "\\" and (place == 0 or top[place - 1])):
            if any(low < place < high for low, high in kept):
                continue
            parts.append(text[start : match.start()].strip())
            separators.append(next((group for group in match.groups() if group), ",").lower())
            start = match.end()
    return [*parts, text[start:].strip()], separators


class Comparison:
    """Compares tidied answers (`drllm.questions.math_text.tidy`); `check` compares two expressions."""

    def __init__(self, check: Checker) -> None:
        self.check = check

    def same(self, gold: str, given: str) -> bool:
        """Whether two answers, or two parts of answers, are equal."""
        if gold == given or same_words(gold, given):
            return True
        for pattern in (_EMPTY, _ALL):
            if pattern.fullmatch(gold) or pattern.fullmatch(given):
                return bool(pattern.fullmatch(gold) and pattern.fullmatch(given))
        if r"\ldots" in gold + given or not gold or not given:
            return False
        regions = region(gold), region(given)
        if any(regions):
            regions = regions[0] or as_interval(gold), regions[1] or as_interval(given)
            return all(regions) and self._any_order(*regions, self._same_interval)
        for step in (self._grids, self._relations, self._lists, self._rows, self._ratios, self._bases):
            answer = step(gold, given)
            if answer is not None:
                return answer
        return self._quantities(gold, given)

    def _any_order(self, gold: list, given: list, same: Callable[..., bool]) -> bool:
        """Whether each part has a partner of its own."""
        left = list(given)
        for item in gold:
            partner = next((place for place, other in enumerate(left) if same(item, other)), None)
            if partner is None:
                return False
            del left[partner]
        return not left

    def _in_order(self, gold: list[str], given: list[str]) -> bool:
        return len(gold) == len(given) and all(map(self.same, gold, given))

    def _same_interval(self, gold: Interval, given: Interval) -> bool:
        for one, other, ends in zip(gold[:2], given[:2], zip(gold[2:], given[2:], strict=True), strict=True):
            if one is None or other is None:
                if one is not other:
                    return False
            elif ends[0] != ends[1] or not self.same(one, other):
                return False
        return True

    def _grids(self, gold: str, given: str) -> bool | None:
        first, second = _MATRIX.fullmatch(gold), _MATRIX.fullmatch(given)
        if not first and not second:
            return None
        if not first or not second or len({m[1] == "|" or "vmatrix" in m[2] for m in (first, second)}) > 1:
            return False
        ends = r"\\\\(?:\s*\[[^\]]*\])?"
        rows = [[row.split("&") for row in re.split(ends, m[3]) if row.strip()] for m in (first, second)]
        return len(rows[0]) == len(rows[1]) and all(
            self._in_order([cell.strip() for cell in one], [cell.strip() for cell in other])
            for one, other in zip(*rows, strict=True)
        )

    def _relations(self, gold: str, given: str) -> bool | None:
        sides, operators = zip(*(split(text, _RELATION) for text in (gold, given)), strict=True)
        if not any(operators):
            return None
        if any(len(split(text, _SEPARATOR)[0]) > 1 for text in (gold, given)):
            return None
        names = [
            part[0] if found in (["="], [r"\in"]) and _NAME.fullmatch(part[0]) else None
            for part, found in zip(sides, operators, strict=True)
        ]
        if all(operators) and not (names[0] and names[0] == names[1]):
            kinds = {tuple(_TURNED.get(one, one) for one in found) for found in operators}
            if len(kinds) > 1 or any(len(found) != 1 for found in operators):
                return False
            differences = []
            for (left, right), (operator,) in zip(sides, operators, strict=True):
                first, second = (right, left) if operator in (">", r"\ge", ">=") else (left, right)
                differences.append(rf"{first}-({second})")
            first, second = differences
            return self._checked(first, second, "equation" if operators[0] == ["="] else "inequality")
        values = [
            part[-1] if not found or name or (found == ["="] and not part[0]) or is_computed(part, found) else None
            for part, found, name in zip(sides, operators, names, strict=True)
        ]
        return None not in values and self.same(*values)

    def _lists(self, gold: str, given: str) -> bool | None:
        if r"\pm" in gold + given:
            gold, given = (
                ", ".join(s for p in split(text, _SEPARATOR)[0] for s in split_signs(p)) for text in (gold, given)
            )
        (first, _), (second, _) = (split(text, _SEPARATOR) for text in (gold, given))
        if len(first) == 1 and len(second) == 1:
            return None
        if len(first) == 1 or len(second) == 1:
            if THOUSANDS.fullmatch(gold):
                return self._in_order(gold.split(","), second)
            if THOUSANDS.fullmatch(given):
                second = given.split(",")
            else:
                one, other = (gold, second) if len(first) == 1 else (given, first)
                inner = bracketed(one)
                if inner and inner[:2] == ("(", ")"):  # "3, 4" for the point (3, 4)
                    return self._in_order(*((inner[2], other) if len(first) == 1 else (other, inner[2])))
                if not (inner and inner[0] == r"\{"):
                    return False
                first, second = (inner[2], second) if len(first) == 1 else (first, inner[2])
        first, second = without_names(first), without_names(second)
        units = [unit_of(parts[-1])[1] for parts in (first, second)]
        if any(units):
            if all(units) and units[0] != units[1]:
                return False
            first, second = ([unit_of(part)[0] for part in parts] for parts in (first, second))
        return self._any_order(first, second, self.same)

    def _rows(self, gold: str, given: str) -> bool | None:
        first, second = bracketed(gold), bracketed(given)
        if not first or not second:
            return False if (first or second) and len((first or second)[2]) > 1 else None
        if len(first[2]) == 1 and len(second[2]) == 1 and r"\{" not in (first[0], second[0]):
            return None
        brackets = {(one[0], one[1]) for one in (first, second)}
        if r"\{" in (first[0], second[0]):
            return len(brackets) == 1 and self._any_order(first[2], second[2], self.same)
        points = {("(", ")"), (r"\langle", r"\rangle")}
        return (len(brackets) == 1 or brackets <= points) and self._in_order(first[2], second[2])

    def _ratios(self, gold: str, given: str) -> bool | None:
        parts = [re.split(r"\s*:\s*|\s*(?:\\text\{\s*to\s*\}|\bto\b)\s*", text) for text in (gold, given)]
        if all(len(part) == 1 for part in parts):
            return None
        if len(parts[0]) != len(parts[1]):
            one, other = sorted(parts, key=len)
            is_share = len(one) == 1 and len(other) == 2 and re.search(r"/|\\frac", one[0])
            return bool(is_share) and self._quantities(rf"\frac{{{other[0]}}}{{{other[1]}}}", one[0])
        if all(re.fullmatch(r"\d+", part) for part in parts[0] + parts[1]) and ":" in gold:
            if re.fullmatch(r"\d{1,2}:\d\d", gold) or re.fullmatch(r"\d{1,2}:\d\d", given):
                return [int(part) for part in parts[0]] == [int(part) for part in parts[1]]
            first, second = ([int(part) for part in side] for side in parts)
            return all(first[0] * y == second[0] * x for x, y in zip(first, second, strict=True))
        return self._in_order(*parts)

    def _bases(self, gold: str, given: str) -> bool | None:
        first, second = based(gold), based(given)
        if first is None and second is None:
            return None
        if first is None or second is None:  # a question that asks for a base need not be told it
            return first is not None and (given.lstrip("0") or "0") == first[0]
        return first == second

    def _quantities(self, gold: str, given: str) -> bool:
        (first, unit), (second, other) = unit_of(gold), unit_of(given)
        if unit and other and unit != other:
            plain = {unit.rstrip("s"), other.rstrip("s")}
            if len(plain) > 1 and not ("unit" in plain and "percent" not in plain):
                return False
        if self._checked(first, second):  # 12.5% for 12.5 where the question asks for percent
            share = fraction(readable(second) or "") if other == "percent" != unit else None
            return share is None or abs(share) >= 1
        if "percent" in (unit, other) and unit != other:
            share, number = (first, second) if unit == "percent" else (second, first)
            return self._checked(rf"\frac{{{share}}}{{100}}", number)
        return False

    def _checked(self, gold: str, given: str, mode: str = "value") -> bool:
        if gold == given:
            return bool(gold)
        first, second = readable(gold), readable(given)
        if first is None or second is None:
            return mode == "value" and same_words(gold, given)
        numbers = fraction(first), fraction(second)
        if mode == "value" and None not in numbers:
            return numbers[0] == numbers[1] or rounds_to(*numbers, gold, given)
        names: dict[str, str] = {}
        first, second = renamed(first, names), renamed(second, names)
        return len(names) <= len(LETTERS) and (first == second or self.check(first, second, mode))


# --------------------------------------------------------------------------------------------------------
# Reading parts


def bracketed(text: str) -> tuple[str, str, list[str]] | None:
    r"""(opening, closing, parts) of a text inside one pair of (), [], \{\} or \langle\rangle."""
    for opening, end in ((r"\{", r"\}"), (r"\langle", r"\rangle"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        inner = text[len(opening) : -len(end)]
        if text.startswith(opening) and text.endswith(end) and len(text) > len(opening) + len(end):
            depth = 0
            for match in _BRACKET.finditer(inner):
                depth += 1 if match["opening"] else -1
                if depth < 0:
                    return None
            return opening, end, split(inner, _SEPARATOR, False)[0]
    return None


def as_interval(text: str) -> list[Interval] | None:
    """The interval that "(a, b)" may stand for, or None."""
    found = bracketed(text)
    if not found or len(found[2]) != 2 or found[0] not in "([":
        return None
    low, high = found[2]
    return [
        (None if low == r"-\infty" else low, None if high in (r"\infty", r"+\infty") else high, found[0] == "[",
         found[1] == "]")
    ]  # fmt: skip


def region(text: str) -> list[Interval] | None:
    """The intervals of an inequality of one variable, of "or" between them, or of a union; None for anything else."""
    if match := re.match(r"[a-zA-Z]\s*\\in(?![a-zA-Z])\s*", text):
        text = text[match.end() :]
    if match := re.fullmatch(r"\\\{\s*[a-zA-Z]\s*[:|]\s*(.*)\\\}", text):
        text = match[1].strip()
    if match := re.fullmatch(r"\\mathbb\{R\}\s*\\setminus\s*\\\{\s*([^{},]+)\\\}", text):
        text = rf"x\ne {match[1]}"
    unions = re.split(r"\\cup(?![a-zA-Z])", text)
    if len(unions) > 1 or r"\infty" in text or (text[:1] in "([" and text[:1] + text[-1:] in ("[)", "(]")):
        found = [as_interval(part.strip()) for part in unions]
        return [interval for part in found for interval in part] if all(found) else None
    parts, words = split(text, _SEPARATOR)
    if len(parts) > 1:
        found = [region(part) for part in parts] if set(words) == {"or"} else [None]
        return [interval for part in found for interval in part] if all(found) else None
    sides, operators = split(text, _RELATION)
    turned = [_TURNED.get(one, one) for one in operators]
    if not operators or not set(turned) <= {"<", r"\le", r"\ne"} or not all(sides):
        return None
    if operators[0] in (">", r"\ge", ">="):
        if any(one not in (">", r"\ge", ">=") for one in operators):
            return None
        sides, turned = sides[::-1], turned[::-1]
    elif any(one in (">", r"\ge", ">=") for one in operators):
        return None
    variables = [re.fullmatch(r"[a-zA-Z]|\\[a-z]+", side) is not None and side != r"\pi" for side in sides]
    if sum(variables) != 1 or any(
        re.search(r"(?<![a-zA-Z\\])[a-df-hj-zA-Z]", s) for s in sides if s not in ("e",) and len(s) > 1
    ):
        return None
    place = variables.index(True)
    if turned == [r"\ne"]:
        bound = sides[1 - place]
        return [(None, bound, False, False), (bound, None, False, False)]
    if r"\ne" in turned or len(sides) > 3 or (len(sides) == 3 and place != 1):
        return None
    low = sides[place - 1] if place else None
    high = sides[place + 1] if place + 1 < len(sides) else None
    return [(low, high, bool(place) and turned[place - 1] == r"\le", high is not None and turned[place] == r"\le")]


def is_computed(sides: list[str], operators: list[str]) -> bool:
    r"""Whether "40 + 2 = 42" or "\\approx 3.14" gives a value after its last operator."""
    if operators == [r"\approx"] and not sides[0]:
        return True
    return set(operators) == {"="} and not re.search(r"(?<![a-zA-Z\\])[a-zA-Z]", "".join(sides[:-1])) and all(sides)


def without_names(parts: list[str]) -> list[str]:
    """ "x = 1, x = 2" and "x = 1, 2" as 1, 2; other names stay."""
    pairs = [split(part, _RELATION) for part in parts]
    named = [sides[0] for sides, found in pairs if found == ["="] and _NAME.fullmatch(sides[0])]
    if named and len(set(named)) == 1 and len(named) in (1, len(parts)) and pairs[0][1] == ["="]:
        return [sides[-1] for sides, _ in pairs]
    return parts


def split_signs(text: str) -> list[str]:
    r"""The two values of an expression with \pm."""
    if not re.search(r"\\pm(?![a-zA-Z])", text):
        return [text]
    signs = (("+", "-"), ("-", "+"))
    return [re.sub(r"\\mp(?![a-zA-Z])", mp, re.sub(r"\\pm(?![a-zA-Z])", pm, text)) for pm, mp in signs]


def based(text: str) -> tuple[str, int] | None:
    """(digits, base) of a number like 2102_3 or "2102 base three", or None."""
    plain = " ".join(TEXT.sub(lambda match: f" {match[1]} ", text).split())
    plain = re.sub(r"_\s*\{\s*(\w+)\s*\}", r"_\1", plain)
    match = _BASED.fullmatch(plain)
    name = (match[2] or match[3]).casefold() if match else ""
    base = int(name) if name.isdigit() and len(name) < 4 else BASE_WORDS.get(name)
    return None if base is None else (match[1].lstrip("0") or "0", base)


def unit_of(text: str) -> tuple[str, str | None]:
    """(text without unit, canonical name of the unit or None)."""
    if (whole := TEXT.fullmatch(text)) and whole[1].strip()[:1].isdigit():
        text = whole[1].strip()
    if text.casefold() in NUMBER_WORDS or (whole and whole[1].strip().casefold() in NUMBER_WORDS):
        return str(NUMBER_WORDS[(whole[1].strip() if whole else text).casefold()]), None
    unit = None
    for sign, name in CURRENCIES.items():
        if text.lstrip("-").startswith(sign):
            text, unit = text.replace(sign, "", 1).strip(), name
            break
    if match := _PERCENT.fullmatch(text):
        return match[1], "percent"
    match = re.fullmatch(r"([^°]+)°\s*(?:\\text\{\s*)?([CF]?)\s*\}?", text)
    if match and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", match[1]):
        return match[1].strip(), {"": "degree", "C": "celsius", "F": "fahrenheit"}[match[2]]
    match = _WORDS_AT_END.fullmatch(text)
    names = unit_names(match["words"], match["power"]) if match else None
    if not names:
        return text, unit
    core = match["core"].strip()
    if names[0] in MULTIPLES:
        core, names = rf"{core}\cdot {MULTIPLES[names[0]]}", names[1:]
    name = " ".join(names) or None
    return (core, name or unit) if unit is None or name in (None, unit) else (text, unit)


def unit_names(words: str, power: str | None) -> list[str] | None:
    """Canonical words of a unit such as "square centimeters", "cm^2" or "miles per hour"; None for other words."""
    plain = TEXT.sub(lambda match: f" {match[1]} ", words).casefold().replace("/", " per ").replace("-", " ")
    plain = re.sub(r"\b([ap])\.?\s?m\b\.?", r"\1m", plain)
    plain = re.sub(r"\s*\^\s*\{?\s*([23])\s*\}?", r" ^\1", plain)
    names, exponent = [], power
    for word in re.findall(r"[^\s.,()]+", plain):
        if word in ("square", "sq", "squared", "^2"):
            exponent = "2"
        elif word in ("cubic", "cu", "cubed", "^3"):
            exponent = "3"
        elif word not in FILLERS:
            names.append(UNITS.get(word) or UNITS.get(word.removesuffix("s")) or word)
    for name in names:
        known = name in UNITS.values() or name in ("per", *MULTIPLES)
        if not known and (name in NO_UNITS or not name.isalpha() or len(name) < 3):
            return None
    if not names:
        return None
    if names[1:] == ["per", "hour"] and names[0] in ("mile", "km"):
        names = ["mph" if names[0] == "mile" else "kmh"]
    return [*names, f"^{exponent}"] if exponent else names
