"""Names that the readers of mathematical answers know: characters, commands, units, words."""

from __future__ import annotations

# Characters as LaTeX.
CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "∙": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/", "∕": "/", "∶": ":", "°": r"^\circ ", "º": r"^\circ ",
    "π": r"\pi ", "𝜋": r"\pi ", "∞": r"\infty ", "√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]",
    "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "Ø": r"\emptyset ", "ø": r"\emptyset ",
    "∈": r"\in ", "∖": r"\setminus ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "…": r"\ldots ", "⋯": r"\ldots ", "′": "'", "’": "'", "‘": "'",
    "“": '"', "”": '"', "∠": r"\angle ", "⟨": r"\langle ", "⟩": r"\rangle ", "∣": "|", "⌊": r"\lfloor ",
    "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "₋": "_{-}", "，": ", ", "、": ", ", "。": ".", "；": "; ",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ", "λ": r"\lambda ",
    "μ": r"\mu ", "φ": r"\phi ", "ω": r"\omega ", "σ": r"\sigma ", "τ": r"\tau ", "ρ": r"\rho ", "¢": " cents",
    "🡒": r"\to ", "→": r"\to ",
}  # fmt: skip
# Commands with another name, or with a sign of their own.
COMMANDS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "nicefrac": "frac", "sfrac": "frac", "dbinom": "binom",
    "tbinom": "binom", "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne",
    "varnothing": "emptyset", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots",
    "ast": "cdot", "bullet": "cdot", "div": "/", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|",
    "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "backslash": r"\setminus ", "lt": "<",
    "gt": ">", "colon": ":", "degree": r"^\circ ", "degrees": r"^\circ ", "euro": "€", "pounds": "£",
    "land": r"\text{ and }", "lor": r"\text{ or }", "vee": r"\text{ or }", "varepsilon": "epsilon",
    "varphi": "phi", "vartheta": "theta", "bigcup": "cup", "dot": "bar", "overbar": "bar", "lparen": "(",
    "rparen": ")", "textdollar": r"\$", "imath": "i", "minus": "-",
}  # fmt: skip


def _words(text: str) -> list[str]:
    return text.split()


FUNCTIONS = frozenset(_words("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp"))
MONTHS = _words("january february march april may june july august september october november december")

_UP_TO_TWENTY = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_TENS = _words("thirty forty fifty sixty seventy eighty ninety hundred")
NUMBER_WORDS = {word: number for number, word in enumerate(_UP_TO_TWENTY)} | {
    word: 10 * number for number, word in enumerate(_TENS, start=3)
}
NUMBER_WORDS |= {f"{ten}-{_UP_TO_TWENTY[one]}": NUMBER_WORDS[ten] + one for ten in _TENS[:-1] for one in range(1, 10)}
NUMBER_WORDS |= {f"twenty-{_UP_TO_TWENTY[one]}": 20 + one for one in range(1, 10)}
BASE_WORDS = NUMBER_WORDS | {"binary": 2, "ternary": 3, "octal": 8, "decimal": 10, "hexadecimal": 16}
MULTIPLES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
CURRENCIES = {"\\$": "dollar", "$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "₹": "rupee"}

# Spellings of a unit; the first is its name.
_SPELLINGS = (
    "cm centimeter centimetre", "mm millimeter millimetre", "m meter metre", "km kilometer kilometre",
    "inch in inches", "foot ft feet", "yard yd", "mile mi", "gram g gm", "kilogram kg kilo", "milligram mg",
    "pound lb lbs", "ounce oz", "liter l litre", "milliliter ml millilitre", "gallon gal", "quart qt", "pint pt",
    "second s sec", "minute min", "hour h hr hrs", "day", "week", "month", "year yr", "mph", "kmh kph kmph", "cup",
    "dollar usd", "cent", "euro eur", "degree deg degs", "radian rad", "unit", "percent", "am", "pm", "celsius",
    "fahrenheit", "acre", "ton tonne", "newton", "joule", "watt", "volt", "hectare ha", "person people", "man men",
    "woman women", "child children",
)  # fmt: skip
UNITS = {name: names.split()[0] for names in _SPELLINGS for name in names.split()}
# Words of a unit that say nothing: "10 years old".
FILLERS = frozenset(_words("of the old long tall high wide deep away total altogether each"))
# Words after a number that are no unit, because they say another number or another thing.
NO_UNITS = frozenset(
    _words(
        "or and to not but nor if when where than then with without plus minus over by mod modulo base choose squared "
        "cubed factorial root roots pi sqrt half third quarter fourth times twice thrice is are was be equals at least "
        "most less more about approximately around between from through until off short even odd prime negative "
        "positive wrong incorrect false true no none other others only except up down remainder power ratio "
        "infinity undefined "
        "n x y z a b c k t u v w i e r p q"
    )
) | {*BASE_WORDS, *MONTHS}
