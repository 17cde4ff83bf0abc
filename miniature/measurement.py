"""Accuracy of a base model per question set and path, without search and without decoding."""

from __future__ import annotations

import argparse
import itertools
import random
from typing import Any

import torch
import transformers

from drllm.checkpoints import load_tokenizer
from drllm.loading import check_finite, loading
from miniature.base_model import answer_positions, encode, hidden_along_paths, keep_memory
from miniature.questions import KINDS, SETS, Question, questions
from miniature.training_paths import read_known_paths

BATCH = 256


def correct(model: Any, tokenizer: Any, asked: list[Question], paths: Any = None) -> Any:
    """Bool [N]: whether greedy decoding gives the response, under one path [L] or one path per question [N,L].

    Greedy decoding gives the response exactly when each of its tokens is the most likely one given the prompt and the
    response so far, so one forward pass over prompt and response is enough.
    """
    blocks = len(model.model.layers)
    paths = torch.ones(blocks, dtype=torch.long) if paths is None else torch.as_tensor(paths)
    paths = paths.expand(len(asked), blocks)
    right = []
    with torch.no_grad():
        for i in range(0, len(asked), BATCH):
            ids, prompt_lengths = encode(asked[i : i + BATCH], tokenizer)
            hidden = hidden_along_paths(model, ids[:, :-1], paths[i : i + BATCH])
            wanted = answer_positions(ids, prompt_lengths, tokenizer.pad_token_id)
            hits = model.lm_head(hidden).argmax(-1) == ids[:, 1:]
            right.append((hits | ~wanted).all(1))
    return torch.cat(right)


def accuracy(model: Any, tokenizer: Any, by_set: dict[str, list[Question]], path: Any = None) -> dict[str, float]:
    """Share of right answers per set, under one path (default: every block once)."""
    return {s: correct(model, tokenizer, asked, path).float().mean().item() for s, asked in by_set.items()}


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints, as Markdown, accuracy per set: default path, every single edit, random edits; then per kind.

    With known paths only the default path and the known path of each question's kind.
    """
    keep_memory()
    torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(arguments.model)
    with loading(arguments.model, "model"):
        model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    check_finite(model, arguments.model)
    by_set = {s: questions(s, arguments.part, arguments.number, arguments.seed) for s in SETS}
    blocks = len(model.model.layers)
    default = [1] * blocks

    def line(name: str, scores: dict[str, float]) -> str:
        mean = sum(scores.values()) / len(scores)
        return f"| {name} | " + " | ".join(f"{100 * v:.1f}" for v in (*scores.values(), mean)) + " |"

    print(f"{arguments.number} questions per set, part {arguments.part!r}; percent right\n")
    print("| path | " + " | ".join(SETS) + " | mean |\n|" + " --- |" * (len(SETS) + 2))
    print(line("default", accuracy(model, tokenizer, by_set)), flush=True)
    if arguments.known_paths is not None:
        known = read_known_paths(arguments.known_paths)
        own = {s: [known[q.kind] for q in asked] for s, asked in by_set.items()}
        scores = {s: correct(model, tokenizer, by_set[s], own[s]).float().mean().item() for s in by_set}
        print(line("known path of each kind", scores))
        lengths = [sum(path) for paths in own.values() for path in paths]
        print(f"\nlayers along the known paths: {sum(lengths) / len(lengths):.2f} of {blocks}")
        return
    for action, word in ((0, "skip"), (2, "repeat")):
        for block in range(blocks):
            path = [*default[:block], action, *default[block + 1 :]]
            print(line(f"{word} {block}", accuracy(model, tokenizer, by_set, path)), flush=True)
    rng = random.Random(arguments.seed)
    for edits, action, word in ((2, 0, "skips"), (3, 0, "skips"), (2, 2, "repeats")):
        # One path per question, so that the mean is over paths as well.
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
    """Random blocks, no two of them adjacent."""
    while True:
        chosen = sorted(rng.sample(range(blocks), edits))
        if all(b - a > 1 for a, b in itertools.pairwise(chosen)):
            return chosen
