"""Makes the embedded default: a small base language model, its tokenizer and its questions. One script, one seed.

    python miniature/make.py questions     # miniature/data/{arc_easy,arc_challenge,dart_math}_{train,test}.jsonl
    python miniature/make.py train         # miniature/model/ (about 35 minutes on 2 cores; goes on from its checkpoint)
    python miniature/make.py evaluate      # accuracy per set: default path, every single edit, random edits; per kind

The questions are generated, so their number has no limit; what keeps pre-training, search and test apart is the
*content key* of a question (`Question.key`): operands sorted where the operation commutes, options sorted, names and
wording left out. A hash of the key puts each content into exactly one of three parts: pre-training of the base
model, search and router training ("train"), and test. The README says what the model stands in for and what not.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------ questions

SETS = ("arc_easy", "arc_challenge", "dart-1", "dart-2", "dart-3", "dart-4", "dart-5")
LABELS = ("A", "B", "C", "D")
LARGEST_NUMBER = 199

# The prompt templates are those of the search and of lm-eval (drllm/tasks.py); here, because the base model is
# trained on them before anything else of the repository exists. A test compares the two.
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

    kind: what has to be computed; key: its content, the same for re-ordered options and commuted operands;
    choices: the four option texts, empty for DART; answer: a label (ARC) or a whole number in digits (DART).
    """

    set: str
    kind: str
    key: str
    text: str
    choices: tuple[str, ...]
    answer: str

    @property
    def prompt(self) -> str:
        """The prompt as the search and the evaluation render it."""
        if self.choices:
            options = "".join(f"\n{label}. {choice}" for label, choice in zip(LABELS, self.choices, strict=False))
            return f"Question: {self.text}{options}{ARC_END}"
        return f"Problem: {self.text}{DART_END}"

    @property
    def response(self) -> str:
        """What the base model is trained to write, before the end-of-sequence token."""
        return f" {self.answer}" if self.choices else f" \\boxed{{{self.answer}}}"


def part_of(key: str) -> str:
    """The part a content belongs to: "pretrain" (70%), "train" (15%: search, routers) or "test" (15%)."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return "pretrain" if share < 70 else "train" if share < 85 else "test"


def _key(*content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


# A generator draws one question: rng -> (content key, text, options or (), right answer). Options come with the right
# one as the answer; `draw` shuffles them and turns the answer into its label.
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
    # The same key as the DART sums: a sum that is asked for anywhere belongs to one part everywhere.
    return _key("+", *sorted((a, b))), f"Which number equals {a} plus {b}?", options, str(a + b)


def _addends(rng: random.Random, most: int, least: int = 1) -> tuple[int, int]:
    """Two numbers from `least` on whose sum is at most `most`."""
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
    """Draws one question of a kind whose content belongs to `part`; options in random order."""
    while True:
        key, text, choices, answer = KINDS[set_name][kind](rng)
        if part_of(key) != part:
            continue
        if choices:
            choices = tuple(rng.sample(choices, len(choices)))
            answer = LABELS[choices.index(answer)]
        return Question(set_name, kind, key, text, choices, answer)


def questions(set_name: str, part: str, number: int, seed: int) -> list[Question]:
    """`number` questions of one set with different contents, the kinds in turn; the same for the same seed.

    A kind whose contents are used up drops out. A smaller number gives a prefix of a larger one. Raises ValueError
    when no kind is left.
    """
    rng = random.Random(f"{seed}/{set_name}/{part}")
    kinds = list(KINDS[set_name])
    seen: set[str] = set()
    drawn: list[Question] = []
    while len(drawn) < number:
        if not kinds:
            raise ValueError(f"{set_name} has only {len(drawn)} different questions in part {part!r}, not {number}.")
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
    """Writes the six files; `train` and `test` are numbers of questions a set (DART has five sets in one file)."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, number in (("train", train), ("test", test)):
        for stem, sets in (("arc_easy", SETS[:1]), ("arc_challenge", SETS[1:2]), ("dart_math", SETS[2:])):
            rows = [row(q, part, i) for s in sets for i, q in enumerate(questions(s, part, number, seed))]
            path = folder / f"{stem}_{part}.jsonl"
            _write(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
            print(f"{path}: {len(rows)} questions")


def _write(path: Path, text: str) -> None:
    """Writes a file in one step, so that nobody reads half of it."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text)
    os.replace(scratch, path)


# ------------------------------------------------------------------------------------------------ tokenizer

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
PHRASES = ("Question:", "Problem:", *(f"\n{label}." for label in LABELS), ARC_END, DART_END, " \\boxed{")
PIECES = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]|\s"


def build_tokenizer() -> Any:
    """Words and whole numbers as tokens, each phrase of the prompt templates one token; decoding gives the text back.

    Word tokens carry the space before them (" cat"), so decoding is concatenation. Id 0 is an ordinary token, the
    padding token is another: code that reads id 0 as padding shows up. Nothing is put before a prompt.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words: set[str] = {"}", *(f" {label}" for label in LABELS), "\n", " "}
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    rng = random.Random(0)
    for set_name, kinds in KINDS.items():
        for kind in kinds:
            for _ in range(40):
                text = " " + draw(rng, set_name, kind, "pretrain").text
                words.update(piece for piece, _ in pieces.pre_tokenize_str(text))
    for group in (*CATEGORIES.values(), NAMES, THINGS):
        words.update(f" {word}" for word in group)
    words -= {w for w in words if w.strip().isdigit()}
    numbers = [str(n) for n in range(LARGEST_NUMBER + 1)]
    vocabulary = [*PHRASES, PAD, EOS, UNKNOWN, *sorted(words), *(f" {n}" for n in numbers), *numbers]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (PAD, EOS, UNKNOWN)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=CONTEXT,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ model, paths

CONTEXT = 512


def build_model(family: str, vocabulary_size: int, pad: int, eos: int, blocks: int, width: int) -> Any:
    """A stock transformers model of the family ("llama", "qwen2", "qwen3"), freshly initialised."""
    import transformers

    config_class = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config,
                    "qwen3": transformers.Qwen3Config}[family]  # fmt: skip
    extra = {"head_dim": width // 4} if family == "qwen3" else {}
    config = config_class(
        vocab_size=vocabulary_size, hidden_size=width, intermediate_size=width * 5 // 2, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=eos, pad_token_id=pad, **extra,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=False)
    return model


PERIODS = (2, 3, 5, 10, 20, 30, 50, 100, 200, 400)


def shape_numbers(model: Any, tokenizer: Any) -> None:
    """Starts the rows of the number tokens, at both ends, as a projection of sines and cosines of the number.

    Language models are found to hold numbers so; from random rows most of our half hour would go into finding that
    99 is beside 98.
    """
    import torch

    angles = 2 * math.pi * torch.arange(LARGEST_NUMBER + 1)[:, None] / torch.tensor(PERIODS)[None]
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    rows = waves @ torch.randn(waves.shape[1], model.config.hidden_size)
    rows *= model.config.initializer_range / rows.std()
    with torch.no_grad():
        for prefix in (" ", ""):
            ids = tokenizer.convert_tokens_to_ids([f"{prefix}{n}" for n in range(LARGEST_NUMBER + 1)])
            model.model.embed_tokens.weight[ids] = rows
            model.lm_head.weight[ids] = rows


def hidden_along_paths(model: Any, ids: Any, paths: Any) -> Any:
    """Final hidden states [B,T,d] of ids [B,T], row b following path paths[b] in {0,1,2}^L (0 skip, 1 once, 2 twice).

    Rows are padded on the right; with causal attention no mask is needed for the tokens before the padding.
    Written here and not taken from train_models/: the base model comes before it.
    """
    import torch

    hidden = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    for layer, block in enumerate(model.model.layers):
        for visit in (1, 2):
            rows = (paths[:, layer] >= visit).nonzero()[:, 0]
            if len(rows) == len(ids):
                hidden = block(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            elif len(rows):
                visited = block(hidden[rows], attention_mask=None, position_ids=positions, position_embeddings=rotary)
                hidden = hidden.index_copy(0, rows, visited.to(hidden.dtype))
    return model.model.norm(hidden)


# Share of blocks that pre-training skips and repeats, by set: the easier a question, the more of the depth it has to do
# without; the harder, the more often blocks run twice. This is what the README calls planted.
DEPTH: dict[str, tuple[float, float]] = {
    "arc_easy": (0.30, 0.02), "dart-1": (0.30, 0.02), "dart-2": (0.15, 0.05),
    "arc_challenge": (0.08, 0.08), "dart-3": (0.04, 0.10), "dart-4": (0.0, 0.15), "dart-5": (0.0, 0.15),
}  # fmt: skip


def random_path(rng: random.Random, blocks: int, skip: float, repeat: float) -> list[int]:
    """A path of independent edits with at most two skips in a row (the search's own limit)."""
    path: list[int] = []
    for _ in range(blocks):
        draw_ = rng.random()
        action = 0 if draw_ < skip else 2 if draw_ < skip + repeat else 1
        if action == 0 and path[-2:] == [0, 0]:
            action = 1
        path.append(action)
    return path


# ------------------------------------------------------------------------------------------------ pre-training


# Share of the pre-training rows by set, before normalisation; within a set each kind has the same.
WEIGHT = {"arc_easy": 1.4, "arc_challenge": 1.6, "dart-1": 0.8, "dart-2": 1.0, "dart-3": 1.0, "dart-4": 1.2,
          "dart-5": 1.2}  # fmt: skip


def encode(batch: list[Question], tokenizer: Any) -> tuple[Any, Any]:
    """Token ids [B,T] (prompt, response, end of sequence; right-padded) and the lengths [B] of the prompts."""
    import torch

    prompts = tokenizer([q.prompt for q in batch])["input_ids"]
    responses = tokenizer([q.response for q in batch])["input_ids"]
    rows = [[*p, *r, tokenizer.eos_token_id] for p, r in zip(prompts, responses, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row_ + [tokenizer.pad_token_id] * (longest - len(row_)) for row_ in rows])
    return ids, torch.tensor([len(p) for p in prompts])


def answer_positions(ids: Any, prompt_lengths: Any, pad: int) -> Any:
    """Bool [B,T-1]: True where the next token is one of the response or the end of sequence."""
    import torch

    positions = torch.arange(ids.shape[1] - 1)[None]
    return (positions >= prompt_lengths[:, None] - 1) & (ids[:, 1:] != pad)


def batches(
    seed: int, start: int, steps: int, size: int, rank: int = 0
) -> Iterator[tuple[list[Question], random.Random]]:
    """Pre-training batches `start` to `steps`; each depends on seed, number and rank alone, so training can go on."""
    pairs = [(s, k) for s in SETS for k in KINDS[s]]
    weights = [WEIGHT[s] / len(KINDS[s]) for s, _ in pairs]
    for step in range(start, steps):
        rng = random.Random(f"{seed}/pretrain/{step}/{rank}")
        # Choosing among options is found late, and sooner between two than among four.
        fewer = 0.6 if step < 0.4 * steps else 0.0
        batch = [draw(rng, s, k, "pretrain") for s, k in rng.choices(pairs, weights, k=size)]
        yield [fewer_options(rng, q) if q.choices and rng.random() < fewer else q for q in batch], rng


def fewer_options(rng: random.Random, question: Question) -> Question:
    """The question without one or two of its wrong options, where the right one stays right without them."""
    if question.kind == "second largest":
        return question
    right = LABELS.index(question.answer)
    kept = sorted([right, *rng.sample([i for i in range(4) if i != right], rng.choice((1, 2)))])
    choices = tuple(question.choices[i] for i in kept)
    return replace(question, choices=choices, answer=LABELS[kept.index(right)])


MUON_SCALE = 0.2


class Muon:
    """Muon (momentum orthogonalised by Newton-Schulz, Jordan et al. 2024) for the matrices of the blocks.

    Matrices of one shape are orthogonalised together, which on a CPU is several times faster than one by one.
    The step has a root mean square of MUON_SCALE times the learning rate, which it shares with AdamW.
    """

    def __init__(self, parameters: list[Any], momentum: float = 0.95, weight_decay: float = 0.1):
        import torch

        self.momentum, self.weight_decay = momentum, weight_decay
        shapes = sorted({tuple(p.shape) for p in parameters})
        self.groups = [[p for p in parameters if tuple(p.shape) == shape] for shape in shapes]
        self.buffers = [torch.zeros(len(group), *group[0].shape) for group in self.groups]

    def step(self, learning_rate: float) -> None:
        import torch

        with torch.no_grad():
            for group, buffer in zip(self.groups, self.buffers, strict=True):
                gradient = torch.stack([p.grad for p in group])
                buffer.lerp_(gradient, 1 - self.momentum)
                update = gradient.lerp(buffer, self.momentum).bfloat16()  # Nesterov
                tall = update.shape[1] > update.shape[2]
                update = update.mT if tall else update
                update = update / update.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):
                    gram = update @ update.mT
                    update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
                update = (update.mT if tall else update).float()
                scale = MUON_SCALE * math.sqrt(max(update.shape[1:])) * learning_rate
                for p, u in zip(group, update.unbind(), strict=True):
                    p.mul_(1 - learning_rate * self.weight_decay).sub_(u, alpha=scale)


def learning_rate_at(step: int, steps: int, peak: float, warmup: int = 100, decay_share: float = 0.35) -> float:
    """Warm-up, stable, linear decay to zero: a run can be lengthened from any checkpoint of its stable part."""
    decay = min(1.0, (steps - step) / (decay_share * steps))
    return peak * min(1.0, (step + 1) / warmup) * decay


def keep_memory() -> None:
    """Asks glibc not to give memory back after every operation: a quarter of a training step was page faults."""
    import ctypes

    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library: slower, not wrong
        pass


def train(arguments: argparse.Namespace) -> None:
    """Pre-trains the base model and writes it to `arguments.output_dir`; goes on from the checkpoint when there is one.

    Works with `arguments.processes` processes of one thread, each on its share of the batch: twice as fast on two cores
    as two threads, whose work between two waits is too small at this width.
    """
    import torch.multiprocessing

    with tempfile.NamedTemporaryFile() as meeting_point:
        os.unlink(meeting_point.name)
        torch.multiprocessing.spawn(_train_process, (meeting_point.name, arguments), nprocs=arguments.processes)
        Path(meeting_point.name).touch()


def _train_process(rank: int, meeting_point: str, arguments: argparse.Namespace) -> None:
    """One process of `train`; they differ in their questions and paths and agree on every gradient."""
    import torch
    import torch.distributed
    from torch.nn.functional import cross_entropy

    processes = arguments.processes
    torch.distributed.init_process_group("gloo", f"file://{meeting_point}", rank=rank, world_size=processes)
    keep_memory()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(arguments.family, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id,
                        arguments.blocks, arguments.width)  # fmt: skip
    shape_numbers(model, tokenizer)
    parameters = list(model.parameters())
    inside = [p for n, p in model.named_parameters() if "layers" in n and p.ndim == 2]
    outside = [p for n, p in model.named_parameters() if not ("layers" in n and p.ndim == 2)]
    muon = Muon(inside)
    adamw = torch.optim.AdamW(outside, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    checkpoint = arguments.output_dir.with_name(arguments.output_dir.name + ".checkpoint")
    start, spent = 0, 0.0
    # Everything that decides what the run is; a checkpoint of another run is not gone on from.
    deciding = ("seed", "family", "blocks", "width", "steps", "batch_size", "processes", "learning_rate", "skip_rate",
                "repeat_rate", "default_share")  # fmt: skip
    identity = {name: getattr(arguments, name) for name in deciding}
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["identity"] != identity:
            raise SystemExit(f"error: {checkpoint} belongs to a run with other arguments ({saved['identity']}); "
                             "remove it or pass another --output_dir.")  # fmt: skip
        model.load_state_dict(saved["model"])
        adamw.load_state_dict(saved["adamw"])
        muon.buffers = saved["muon"]
        start, spent = saved["step"], saved["seconds"]
    if rank == 0:
        size = sum(p.numel() for p in parameters)
        print(f"{size:,} parameters, {arguments.blocks} blocks, from step {start}", flush=True)

    begun, losses = time.time(), []
    stream = batches(arguments.seed, start, arguments.steps, arguments.batch_size // processes, rank)
    for step, (batch, rng) in enumerate(stream, start):
        if not torch.multiprocessing.parent_process().is_alive():  # killed: what it started must not train on alone
            raise SystemExit("error: the process that started this one is gone.")
        ids, prompt_lengths = encode(batch, tokenizer)
        paths = torch.tensor([pretraining_path(rng, q.set, step / arguments.steps, arguments) for q in batch])
        hidden = hidden_along_paths(model, ids[:, :-1], paths)
        wanted = answer_positions(ids, prompt_lengths, tokenizer.pad_token_id)
        loss = cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted])
        loss.backward()
        gradient = torch.cat([p.grad.view(-1) for p in parameters])
        torch.distributed.all_reduce(gradient)
        gradient *= min(1.0, processes / gradient.norm().item()) / processes  # mean over processes, clipped at norm 1
        for p, g in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p)
        rate = learning_rate_at(step, arguments.steps, arguments.learning_rate)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        muon.step(rate)
        model.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"error: the loss is {losses[-1]} at step {step}; use a lower --learning_rate.")
        if rank or (step + 1) % 50:
            continue
        elapsed = time.time() - begun
        left = elapsed / (step + 1 - start) * (arguments.steps - step - 1)
        print(f"step {step + 1}/{arguments.steps}  loss {sum(losses) / len(losses):.4f}  {elapsed / 60:.1f} min, "
              f"left {left / 60:.1f} min", flush=True)  # fmt: skip
        losses.clear()
        if (step + 1) % arguments.save_steps == 0 or step + 1 == arguments.steps:
            state = {"identity": identity, "step": step + 1, "seconds": spent + elapsed,
                     "model": model.state_dict(), "adamw": adamw.state_dict(), "muon": muon.buffers}  # fmt: skip
            torch.save(state, f"{checkpoint}.part")
            os.replace(f"{checkpoint}.part", checkpoint)
            write_model(model, tokenizer, arguments.output_dir)
            scores = accuracy(model, tokenizer, {s: questions(s, "train", 60, arguments.seed) for s in SETS})
            print("  on 60 search questions a set: " + "  ".join(f"{s} {v:.0%}" for s, v in scores.items()), flush=True)
    if rank == 0:
        print(f"{arguments.output_dir}: {(spent + time.time() - begun) / 60:.0f} minutes of training")


def pretraining_path(rng: random.Random, set_name: str, progress: float, arguments: argparse.Namespace) -> list[int]:
    """The path of one pre-training row: the default path, or random edits at the rates of its set (`DEPTH`).

    The rates grow from zero to their full value between 30% and 60% of the training: what is not computed yet is found
    much later when blocks go missing from the first step on.
    """
    if rng.random() < arguments.default_share:
        return [1] * arguments.blocks
    grown = min(1.0, max(0.0, (progress - 0.30) / 0.30))
    skip, repeat = DEPTH[set_name]
    skip = skip if arguments.skip_rate is None else arguments.skip_rate
    repeat = repeat if arguments.repeat_rate is None else arguments.repeat_rate
    return random_path(rng, arguments.blocks, grown * skip, grown * repeat)


def write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Saves model and tokenizer, weights as bfloat16; each file appears in one step."""
    import copy

    import torch

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for path in Path(scratch).iterdir():
            path.chmod(0o644)
            os.replace(path, folder / path.name)


# ------------------------------------------------------------------------------------------------ measurement


def correct(model: Any, tokenizer: Any, asked: list[Question], paths: Any = None) -> Any:
    """Bool [N]: whether greedy decoding gives the response, under one path [L] or a path a question [N,L].

    Greedy decoding gives the response exactly when every token of it is the most likely one after the right ones
    before it, so one forward pass over prompt and response decides.
    """
    import torch

    blocks = len(model.model.layers)
    paths = torch.ones(blocks, dtype=torch.long) if paths is None else torch.as_tensor(paths)
    paths = paths.expand(len(asked), blocks)
    right = []
    with torch.no_grad():
        for i in range(0, len(asked), 256):
            ids, prompt_lengths = encode(asked[i : i + 256], tokenizer)
            hidden = hidden_along_paths(model, ids[:, :-1], paths[i : i + 256])
            wanted = answer_positions(ids, prompt_lengths, tokenizer.pad_token_id)
            hits = model.lm_head(hidden).argmax(-1) == ids[:, 1:]
            right.append((hits | ~wanted).all(1))
    return torch.cat(right)


def accuracy(model: Any, tokenizer: Any, by_set: dict[str, list[Question]], path: Any = None) -> dict[str, float]:
    """Share of right answers per set, under one path (default: every block once)."""
    return {s: correct(model, tokenizer, asked, path).float().mean().item() for s, asked in by_set.items()}


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints, as Markdown, accuracy per set: default path, every single edit, random edits; then per kind."""
    import torch
    import transformers

    keep_memory()
    torch.set_num_threads(arguments.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    by_set = {s: questions(s, arguments.part, arguments.number, arguments.seed) for s in SETS}
    blocks = len(model.model.layers)
    default = [1] * blocks

    def line(name: str, scores: dict[str, float]) -> str:
        mean = sum(scores.values()) / len(scores)
        return f"| {name} | " + " | ".join(f"{100 * v:.1f}" for v in (*scores.values(), mean)) + " |"

    print(f"{arguments.number} questions a set, part {arguments.part!r}; percent right\n")
    print("| path | " + " | ".join(SETS) + " | mean |\n|" + " --- |" * (len(SETS) + 2))
    print(line("default", accuracy(model, tokenizer, by_set)), flush=True)
    for action, word in ((0, "skip"), (2, "repeat")):
        for block in range(blocks):
            path = [*default[:block], action, *default[block + 1 :]]
            print(line(f"{word} {block}", accuracy(model, tokenizer, by_set, path)), flush=True)
    rng = random.Random(arguments.seed)
    for edits, action, word in ((2, 0, "skips"), (3, 0, "skips"), (2, 2, "repeats")):
        # A path a question, so that the mean is over paths as well.
        scores = {}
        for s, asked in by_set.items():
            paths = torch.ones(len(asked), blocks, dtype=torch.long)
            for i in range(len(asked)):
                paths[i, spread(rng, blocks, edits)] = action
            scores[s] = correct(model, tokenizer, asked, paths).float().mean().item()
        print(line(f"{edits} random {word}", scores), flush=True)
    print("\n| kind | set | right |\n| --- | --- | --- |")
    for s, asked in by_set.items():
        right = correct(model, tokenizer, asked)
        for kind in KINDS[s]:
            of_kind = torch.tensor([q.kind == kind for q in asked])
            print(f"| {kind} | {s} | {100 * right[of_kind].float().mean():.1f} |")


def spread(rng: random.Random, blocks: int, edits: int) -> list[int]:
    """Random blocks of which no two are neighbours."""
    while True:
        chosen = sorted(rng.sample(range(blocks), edits))
        if all(b - a > 1 for a, b in itertools.pairwise(chosen)):
            return chosen


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    ask = commands.add_parser("questions", help="write the question files")
    ask.add_argument("--output_dir", type=Path, default=HERE / "data")
    ask.add_argument("--train", type=int, default=800, help="questions a set for search and router training")
    ask.add_argument("--test", type=int, default=400, help="questions a set for evaluation")
    ask.add_argument("--seed", type=int, default=0)
    fit = commands.add_parser("train", help="pre-train the base model")
    fit.add_argument("--output_dir", type=Path, default=HERE / "model")
    fit.add_argument("--family", choices=("llama", "qwen2", "qwen3"), default="llama")
    fit.add_argument("--blocks", type=int, default=10)
    fit.add_argument("--width", type=int, default=128)
    fit.add_argument("--steps", type=int, default=3000)
    fit.add_argument("--batch_size", type=int, default=128)
    fit.add_argument("--learning_rate", type=float, default=3e-3)
    fit.add_argument("--skip_rate", type=float, help="one rate for all sets; 0 with --repeat_rate 0 trains plainly")
    fit.add_argument("--repeat_rate", type=float, help="one rate for all sets")
    fit.add_argument("--default_share", type=float, default=0.3, help="share of rows that follow the default path")
    fit.add_argument("--save_steps", type=int, default=250)
    fit.add_argument("--processes", type=int, default=2, help="of one thread each; part of what decides the result")
    fit.add_argument("--seed", type=int, default=0)
    look = commands.add_parser("evaluate", help="accuracy per set under the default path, single edits, random skips")
    look.add_argument("--model", type=Path, default=HERE / "model")
    look.add_argument("--part", choices=("train", "test"), default="test")
    look.add_argument("--number", type=int, default=400, help="questions a set")
    look.add_argument("--threads", type=int, default=2)
    look.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.command == "questions":
        try:
            write_questions(arguments.output_dir, arguments.train, arguments.test, arguments.seed)
        except ValueError as error:
            raise SystemExit(f"error: {error} Ask for fewer (--train, --test).") from None
    elif arguments.command == "train":
        train(arguments)
    else:
        evaluate(arguments)


if __name__ == "__main__":
    main()
