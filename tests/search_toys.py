"""A random model that answers in letters and boxes, and questions for it: what the tests of the search run on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_models import load_path_model
from drllm.questions.prompts import Prompt
from drllm.questions.sets import Question, load_questions
from extensions.baselines.interface import Answered

LETTERS = ["A", "B", "C", "D"]
BOXES = [f"\\boxed{{{value}}}" for value in range(6)]
WORDS = [f"w{number}" for number in range(40)]
FIXED = ["Question:", "Problem:", "Answer:", "with", "the", "label", "A.", "B.", "C.", "D."]
VOCABULARY = ["<unk>", "<s>", "</s>", *LETTERS, *BOXES, *WORDS, *FIXED]
ANSWERS = range(2, 3 + len(LETTERS + BOXES))  # ids that the model may answer with, </s> among them


def make_model(folder: Path, stock_model) -> Path:
    """A random checkpoint in `folder` whose greedy answers depend on the path; `stock_model` is the fixture."""
    model = stock_model("llama", {"vocab_size": len(VOCABULARY), "eos_token_id": 2, "tie_word_embeddings": False})
    with torch.no_grad():
        quiet = torch.ones(len(VOCABULARY), dtype=torch.bool)
        quiet[list(ANSWERS)] = False
        model.lm_head.weight[quiet] *= 0.01
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


def make_data(folder: Path, count: int, seed: int = 0) -> Path:
    """`count` questions per set, of different lengths, in the Hub's schemas: both ARC sets and DART levels 1 and 2."""
    choose = random.Random(seed)

    def text() -> str:
        return " ".join(choose.choices(WORDS, k=choose.randint(2, 14)))

    folder.mkdir(parents=True, exist_ok=True)
    for stem in ("arc_easy", "arc_challenge"):
        with (folder / f"{stem}_train.jsonl").open("w") as file:
            for number in range(count):
                choices = {"text": choose.sample(WORDS, 4), "label": LETTERS}
                row = {"id": f"{number}", "question": text(), "choices": choices, "answerKey": choose.choice(LETTERS)}
                print(json.dumps(row), file=file)
    with (folder / "dart_math_train.jsonl").open("w") as file:
        for number in range(2 * count):
            level = {"level": 1 + number % 2, "id": f"train/{number}"}
            row = {"query": text(), "gt_ans": str(choose.randrange(6)), "query_metadata": level}
            print(json.dumps(row), file=file)
    return folder


def load(folder: Path):
    """(model, tokenizer) of `folder`, fp32."""
    return load_path_model(str(folder), dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def prompts(data: Path, tokenizer, sets=("arc_easy", "dart-1", "dart-2")) -> list[Prompt]:
    """The prompts of all questions of `sets`."""
    return [
        Prompt.of(question, tokenizer, chat=False) for name in sets for question in load_questions(name, "train", data)
    ]


def answered_questions(count: int) -> list[Answered]:
    """Prompts and answers of random tokens, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        ids = tuple(torch.randint(2, 61, (4 + 3 * number,), generator=generator).tolist())
        answer = tuple(torch.randint(2, 61, (1 + number % 3,), generator=generator).tolist())
        question = Question("dart-1", f"q{number}", "", (), (), "0")
        made.append(Answered(Prompt(question, "", ids, 5), answer))
    return made
