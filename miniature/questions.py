"""The questions of the miniature: 21 kinds of computation, drawn from a seed.

The questions are generated, so their number has no limit. Pre-training, search and test are kept apart by the *content
key* of a question (`Question.key`): operands sorted where the operation commutes, options sorted, names and wording
left out. A hash of the key assigns each content to exactly one of three parts: pre-training of the base model, search
and router training ("train"), and test.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import UserError
from drllm.files import write_whole

SETS = ("arc_easy", "arc_challenge", "dart-1", "dart-2", "dart-3", "dart-4", "dart-5")
LABELS = ("A", "B", "C", "D")
LARGEST_NUMBER = 199

# The prompt templates of the search and of lm-eval (drllm/questions/sets.py). They are repeated here because the base
# model is trained on them before anything else of the repository exists. A test compares the two.
ARC_END = "\nAnswer with the label of the correct option only.\nAnswer:"
DART_END = "\nGive only the final answer, as \\boxed{answer}.\nAnswer:"

LEXICON = """\
an animal: dog cat horse cow sheep goat lion tiger bear wolf fox rabbit mouse whale eagle frog
a fruit: apple pear plum cherry grape lemon orange banana peach melon mango kiwi fig lime olive papaya
a color: red blue green yellow black white brown pink purple gray gold silver violet scarlet beige cyan
a tool: hammer saw drill wrench pliers axe shovel rake chisel file clamp knife ladder level brush scissors
a vehicle: car bus train truck ship boat plane bicycle tram taxi ferry rocket tractor van wagon sled
a metal: iron copper zinc tin lead nickel steel brass bronze cobalt titanium chrome mercury platinum uranium aluminum
a garment: shirt coat hat scarf glove sock shoe dress skirt jacket belt sweater vest boot cap robe
an organ: heart lung liver kidney brain stomach skin eye ear tongue spleen bladder muscle nerve bone vein
"""
CATEGORIES = {name: words.split() for name, words in (line.split(": ") for line in LEXICON.splitlines())}
NAMES = ["Tom", "Ann", "Ben", "Eva", "Max", "Mia", "Sam", "Zoe"]
THINGS = ["apples", "books", "coins", "cards", "stones", "pens", "eggs", "balls"]


@dataclass(frozen=True)
class Question:
    """One generated question.

    Attributes:
        set: the question set, one of `SETS`.
        kind: what has to be computed, a key of `KINDS[set]`.
        key: the content, the same for re-ordered options and commuted operands.
        text: the question without options and template.
        choices: the four option texts, empty for DART.
        answer: a label (ARC) or a whole number in digits (DART).
    """

    set: str
    kind: str
    key: str
    text: str
    choices: tuple[str, ...]
    answer: str

    @property
    def prompt(self) -> str:
        """The prompt as rendered by the search and the evaluation."""
        if self.choices:
            options = "".join(f"\n{label}. {choice}" for label, choice in zip(LABELS, self.choices, strict=False))
            return f"Question: {self.text}{options}{ARC_END}"
        return f"Problem: {self.text}{DART_END}"

    @property
    def response(self) -> str:
        """The completion that the base model is trained on, without the end-of-sequence token."""
        return f" {self.answer}" if self.choices else f" \\boxed{{{self.answer}}}"


def part_of(key: str) -> str:
    """The part of a content key: "pretrain" (70%), "train" (15%: search, routers) or "test" (15%)."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return "pretrain" if share < 70 else "train" if share < 85 else "test"


def _key(*content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


# A generator draws one question: rng -> (content key, text, options or (), right answer). `draw` shuffles the options
# and replaces the answer by its label.
Draw = tuple[str, str, tuple[str, ...], str]


def _four(rng: random.Random, low: int = 0, high: int = 99) -> list[int]:
    return rng.sample(range(low, high + 1), 4)


def _ranked(rank: int, word: str) -> Callable[[random.Random], Draw]:
    def generate(rng: random.Random) -> Draw:
        numbers = sorted(_four(rng))
        choices = tuple(map(str, numbers))
        return _key("rank", rank, numbers), f"Which number is the {word}?", choices, str(numbers[rank])

    return generate


def category(rng: random.Random) -> Draw:
    names = rng.sample(list(CATEGORIES), 4)
    words = [rng.choice(CATEGORIES[name]) for name in names]
    return _key("category", names[0], sorted(words)), f"Which word names {names[0]}?", tuple(words), words[0]


def closest(rng: random.Random) -> Draw:
    while True:
        numbers, target = _four(rng), rng.randrange(100)
        distances = sorted(abs(n - target) for n in numbers)
        if distances[0] > 0 and distances[0] + 4 <= distances[1]:
            answer = min(numbers, key=lambda n: abs(n - target))
            key = _key("closest", target, sorted(numbers))
            return key, f"Which number is closest to {target}?", tuple(map(str, numbers)), str(answer)


def sum_choice(rng: random.Random) -> Draw:
    a, b = _addends(rng, 150)
    wrong = [a + b + d for d in rng.sample([-20, -11, -10, -9, -3, -2, -1, 1, 2, 3, 9, 10, 11, 19], 10)]
    options = tuple(map(str, [a + b, *[n for n in wrong if n >= 0][:3]]))
    # The same key as the DART sums, so that a sum belongs to the same part in every set.
    return _key("+", *sorted((a, b))), f"Which number equals {a} plus {b}?", options, str(a + b)


def _addends(rng: random.Random, most: int, least: int = 1) -> tuple[int, int]:
    """Two numbers of at least `least` whose sum is at most `most`."""
    while True:
        a, b = rng.randrange(least, most), rng.randrange(least, most)
        if a + b <= most:
            return a, b


def story_sum(rng: random.Random) -> Draw:
    a, b = _addends(rng, 80)
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    text = f"{name} has {a} {things} and gets {b} more. How many are there now?"
    return _key("+", *sorted((a, b))), text, (), str(a + b)


def story_difference(rng: random.Random) -> Draw:
    a, b = sorted((rng.randrange(1, 60), rng.randrange(1, 60)))
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    return _key("-", b, a), f"{name} has {b} {things} and gives away {a}. How many are left?", (), str(b - a)


def larger(rng: random.Random) -> Draw:
    a, b = rng.sample(range(100), 2)
    word, answer = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    text = f"Two cards show the numbers {a} and {b}. Which number is {word}?"
    return _key(word, *sorted((a, b))), text, (), str(answer)


def plain_sum(rng: random.Random) -> Draw:
    a, b = _addends(rng, LARGEST_NUMBER)
    return _key("+", *sorted((a, b))), f"What do you get when you add the two numbers {a} and {b}?", (), str(a + b)


def plain_difference(rng: random.Random) -> Draw:
    a, b = sorted((rng.randrange(1, 150), rng.randrange(1, 150)))
    return _key("-", b, a), f"What do you get when you take away the number {a} from {b}?", (), str(b - a)


def count(rng: random.Random) -> Draw:
    words = rng.sample(CATEGORIES["an animal"], 3)
    listed = [rng.choice(words) for _ in range(7)]
    text = f"How many times is {words[0]} in the list {' '.join(listed)}?"
    return _key("count", words[0], sorted(listed)), text, (), str(listed.count(words[0]))


def add_then_subtract(rng: random.Random) -> Draw:
    a, b = _addends(rng, 150)
    c = rng.randrange(1, min(100, a + b + 1))
    text = f"Start with {a}, add {b} and take away {c}. What is the result?"
    return _key("+-", *sorted((a, b)), c), text, (), str(a + b - c)


def larger_then_add(rng: random.Random) -> Draw:
    a, b = rng.sample(range(1, 100), 2)
    c = rng.randrange(1, 100)
    word, first = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    text = f"Take the {word} of {a} and {b} and add {c}. What is the result?"
    return _key("larger+", word, *sorted((a, b)), c), text, (), str(first + c)


def double_then_add(rng: random.Random) -> Draw:
    a = rng.randrange(1, 75)
    b = rng.randrange(1, LARGEST_NUMBER + 1 - 2 * a)
    return _key("2a+b", a, b), f"Double the number {a} and then add {b}. What is the result?", (), str(2 * a + b)


def add_then_multiply(rng: random.Random) -> Draw:
    c = rng.randrange(2, 10)
    a, b = _addends(rng, LARGEST_NUMBER // c)
    text = f"Add {a} and {b} and then multiply the sum by {c}. What is the result?"
    return _key("(+)*", *sorted((a, b)), c), text, (), str((a + b) * c)


def remainder(rng: random.Random) -> Draw:
    a, b = rng.randrange(10, LARGEST_NUMBER + 1), rng.randrange(3, 14)
    text = f"What is the remainder when the number {a} is divided by the number {b}?"
    return _key("mod", a, b), text, (), str(a % b)


def median(rng: random.Random) -> Draw:
    numbers = rng.sample(range(1, 100), 5)
    text = f"Sort the numbers {' '.join(map(str, numbers))}. Which one is in the middle?"
    return _key("median", sorted(numbers)), text, (), str(sorted(numbers)[2])


def multiply_then_add(rng: random.Random) -> Draw:
    a, b = rng.randrange(2, 14), rng.randrange(2, 14)
    c = rng.randrange(1, LARGEST_NUMBER + 1 - a * b)
    text = f"Multiply {a} by {b} and then add {c}. What is the result?"
    return _key("*+", *sorted((a, b)), c), text, (), str(a * b + c)


def difference_of_products(rng: random.Random) -> Draw:
    (c, d), (a, b) = sorted(([rng.randrange(2, 14) for _ in "ab"] for _ in "xy"), key=math.prod)
    text = f"How much more is the product {a} times {b} than {c} times {d}?"
    return _key("**-", sorted((a, b)), sorted((c, d))), text, (), str(a * b - c * d)


def larger_sum(rng: random.Random) -> Draw:
    (a, b), (c, d) = _addends(rng, 100), _addends(rng, 100)
    text = f"One pair is {a} and {b}, another {c} and {d}. What is the larger sum?"
    return _key("larger sum", sorted((sorted((a, b)), sorted((c, d))))), text, (), str(max(a + b, c + d))


KINDS: dict[str, dict[str, Callable[[random.Random], Draw]]] = {
    "arc_easy": {"largest": _ranked(3, "largest"), "smallest": _ranked(0, "smallest"), "category": category},
    "arc_challenge": {"second largest": _ranked(2, "second largest"), "closest": closest, "sum choice": sum_choice},
    "dart-1": {"story sum": story_sum, "story difference": story_difference, "larger": larger},
    "dart-2": {"sum": plain_sum, "difference": plain_difference, "larger, add": larger_then_add},
    "dart-3": {"add, subtract": add_then_subtract, "double, add": double_then_add, "larger sum": larger_sum},
    "dart-4": {"add, multiply": add_then_multiply, "remainder": remainder, "median": median},
    "dart-5": {"multiply, add": multiply_then_add, "difference of products": difference_of_products, "count": count},
}


def draw(rng: random.Random, set_name: str, kind: str, part: str) -> Question:
    """Draws one question of a kind with content in `part`; options in random order."""
    while True:
        key, text, choices, answer = KINDS[set_name][kind](rng)
        if part_of(key) != part:
            continue
        if choices:
            choices = tuple(rng.sample(choices, len(choices)))
            answer = LABELS[choices.index(answer)]
        return Question(set_name, kind, key, text, choices, answer)


def questions(set_name: str, part: str, number: int, seed: int) -> list[Question]:
    """`number` questions of one set with different contents, cycling through its kinds; deterministic given the seed.

    A kind with no unused content left drops out. A smaller number gives a prefix of a larger one.

    Raises:
        UserError: no kind is left.
    """
    rng = random.Random(f"{seed}/{set_name}/{part}")
    kinds = list(KINDS[set_name])
    seen: set[str] = set()
    drawn: list[Question] = []
    while len(drawn) < number:
        if not kinds:
            raise UserError(
                f"{set_name} has only {len(drawn)} different questions in part {part!r}, not {number}; ask for fewer"
            )
        kind = kinds.pop(0)
        for _ in range(2_000):
            question = draw(rng, set_name, kind, part)
            if question.key not in seen:
                seen.add(question.key)
                drawn.append(question)
                kinds.append(kind)
                break
    return drawn


def row(question: Question, part: str, index: int) -> dict[str, Any]:
    """The question in the schema of its Hub data set (allenai/ai2_arc or hkust-nlp/dart-math-pool-math)."""
    if question.choices:
        choices = {"text": list(question.choices), "label": list(LABELS)}
        name = f"{question.set}-{part}-{index}-{question.kind.replace(' ', '_')}"
        return {"id": name, "question": question.text, "choices": choices, "answerKey": question.answer}
    metadata = {"level": int(question.set[-1]), "subject": question.kind, "id": f"{part}/{question.set}/{index}"}
    return {"query": question.text, "gt_ans": question.answer, "query_metadata": metadata}


def write_questions(folder: Path, train: int, test: int, seed: int) -> None:
    """Writes the six files; `train` and `test` are numbers of questions per set (DART has five sets in one file)."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, number in (("train", train), ("test", test)):
        for stem, sets in (("arc_easy", SETS[:1]), ("arc_challenge", SETS[1:2]), ("dart_math", SETS[2:])):
            rows = [row(q, part, i) for s in sets for i, q in enumerate(questions(s, part, number, seed))]
            path = folder / f"{stem}_{part}.jsonl"
            write_whole(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
            print(f"{path}: {len(rows)} questions")
