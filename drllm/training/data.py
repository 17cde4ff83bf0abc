"""From label folders to training examples: which rows, which paths, which questions are held out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from drllm.errors import UserError
from drllm.labels import read_labels
from drllm.questions.prompts import adds_special_tokens
from drllm.training.features import Example

OPTIONAL_SETS = {"squadv2": "with_squad", "commonsense": "with_commonsense"}


@dataclass(frozen=True)
class TrainingLabels:
    """Labels of one or more folders that belong together.

    Attributes:
        rows: of the sets in use.
        manifests: one a folder.
        model, revision, model_fingerprint, num_layers, dtype, chat_template: what all manifests agree on.
    """

    rows: list[dict]
    manifests: list[dict]
    model: str
    revision: str | None
    model_fingerprint: str
    num_layers: int
    dtype: str
    chat_template: bool


def load_labels(
    directories: Sequence[str],
    with_squad: bool = False,
    with_commonsense: bool = False,
    say: Callable[[str], None] = print,
) -> TrainingLabels:
    """Read label folders, drop the optional sets that were not asked for, check that the folders belong together.

    Raises:
        UserError: folders of different models, layer counts, dtypes or templates; a question labelled twice; no row
            left.
    """
    wanted = {"squadv2": with_squad, "commonsense": with_commonsense}
    rows, manifests, left_out = [], [], Counter()
    for directory in directories:
        labels = read_labels(Path(directory))
        manifests.append(labels.manifest)
        for row in labels.rows:
            if wanted.get(row["set"], True):
                rows.append(row)
            else:
                left_out[row["set"]] += 1
    for set_name, count in left_out.items():
        say(f"labels: leaving out {count} rows of {set_name}; --{OPTIONAL_SETS[set_name]} uses them")
    first = manifests[0]
    for directory, manifest in zip(directories[1:], manifests[1:], strict=True):
        for name in ("model_fingerprint", "num_layers", "dtype", "chat_template"):
            if manifest[name] != first[name]:
                raise UserError(
                    f"the labels in {directory} have {name} {manifest[name]!r}, those in {directories[0]} "
                    f"{first[name]!r}; labels of different models cannot train one set of routers"
                )
    for set_name, flag in OPTIONAL_SETS.items():
        if wanted[set_name] and not any(row["set"] == set_name for row in rows):
            raise UserError(
                f"--{flag} was given, but {' '.join(directories)} has no rows of {set_name}; make them with "
                f"data_generation.py --dataset {set_name}"
            )
    identities = Counter((row["set"], row["question_id"]) for row in rows)
    repeated = [identity for identity, count in identities.items() if count > 1]
    if repeated:
        raise UserError(
            f"question {'/'.join(repeated[0])} has labels twice in {' '.join(directories)}; name each "
            "folder once, and label each question once"
        )
    if not rows:
        raise UserError(f"no labels to train on in {' '.join(directories)}")
    return TrainingLabels(
        rows,
        manifests,
        model=first["model"],
        revision=first.get("revision"),
        model_fingerprint=first["model_fingerprint"],
        num_layers=first["num_layers"],
        dtype=first["dtype"],
        chat_template=bool(first["chat_template"]),
    )


def make_examples(labels: TrainingLabels, tokenizer, paths: str = "best") -> list[Example]:
    """One example a question (its best path) or one a good path (`paths="all"`).

    Prompts are tokenised as the search did: special tokens are added unless a chat template brought its own BOS.
    """
    examples = []
    for row in labels.rows:
        special = adds_special_tokens(row["prompt"], tokenizer)
        token_ids = tokenizer(row["prompt"], add_special_tokens=special)["input_ids"]
        best = tuple(row["optimal_layer_config"])
        chosen = [best]
        if paths == "all":
            chosen += [path for path in map(tuple, row["good_paths"]) if path != best]
        question = f"{row['set']}/{row['question_id']}"
        examples += [Example(question, tuple(token_ids), path) for path in chosen]
    return examples


def split_by_question(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, held-out) indices; all examples of a question land on one side.

    At least one question is held out when fraction > 0 and there are two; one question alone stays in training.
    """
    questions = sorted({e.question for e in examples})
    random.Random(seed).shuffle(questions)
    count = 0
    if fraction > 0 and len(questions) > 1:
        count = min(max(1, round(fraction * len(questions))), len(questions) - 1)
    held_out = set(questions[:count])
    train = [i for i, e in enumerate(examples) if e.question not in held_out]
    return train, [i for i, e in enumerate(examples) if e.question in held_out]
