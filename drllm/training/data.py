"""From label folders to training examples: which rows, which paths, which questions are held out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from drllm.errors import UserError
from drllm.files import shorten
from drllm.labels import Example, Label, plain_label_files, read_labels, read_plain_labels
from drllm.manifests import LABELS, MANIFEST, PROGRESS, Manifest
from drllm.questions.prompts import adds_special_tokens, apply_template

OPTIONAL_SETS = {"squadv2": "with_squad", "commonsense": "with_commonsense"}
# The folder of the authors' first step, and that of ours.
DEFAULT_FOLDERS = ("data/mcts_paths", "data")


@dataclass(frozen=True)
class TrainingLabels:
    """Labels of one or more folders that belong together.

    Attributes:
        labels: labels of the sets in use.
        manifests: one per folder, which agree on the model and its prompts; empty for labels without a manifest.
    """

    labels: list[Label]
    manifests: list[Manifest]

    @property
    def manifest(self) -> Manifest | None:
        """What the labels belong to; None for labels without a manifest."""
        return self.manifests[0] if self.manifests else None

    @property
    def num_layers(self) -> int:
        """Blocks that each path describes."""
        return len(self.labels[0].path)


def holds_labels(source: Path) -> bool:
    """Whether a folder holds labels, of data_generation.py or of another program."""
    return source.is_dir() and ((source / MANIFEST).exists() or bool(plain_label_files(source)))


def default_folder() -> str:
    """Where labels are read from without --data: data/mcts_paths or data, whichever holds labels.

    Raises:
        UserError: neither does, or both do.
    """
    filled = [name for name in DEFAULT_FOLDERS if holds_labels(Path(name))]
    if len(filled) == 1:
        return filled[0]
    names = " and ".join(DEFAULT_FOLDERS)
    if filled:
        raise UserError(f"{names} both hold labels; pass one of them with --data")
    raise UserError(
        f"no labels in {' or '.join(DEFAULT_FOLDERS)}: make them with data_generation.py, or pass their folder with "
        "--data"
    )


def load_labels(
    sources: Sequence[str],
    with_squad: bool = False,
    with_commonsense: bool = False,
    say: Callable[[str], None] = print,
) -> TrainingLabels:
    """Read labels, drop the optional sets that are not wanted, check that the sources belong together.

    Args:
        sources: label folders of data_generation.py, or folders and files of labels without a manifest
            (`read_plain_labels`), not both.
        with_squad, with_commonsense: keep the rows of these sets.
        say: prints what is left out.

    Raises:
        UserError: damaged labels; folders of different models, layer counts, dtypes or templates; a question labelled
            twice; no row left.
    """
    wanted = {"squadv2": with_squad, "commonsense": with_commonsense}
    shown = " ".join(sources)
    plain = [_is_plain(Path(source)) for source in sources]
    if any(plain) and not all(plain):
        raise UserError(f"{shown}: labels with and without a {MANIFEST} cannot be mixed; train on one kind at a time")
    labels: list[Label] = []
    manifests: list[Manifest] = []
    left_out: Counter[str] = Counter()
    for source in sources:
        if plain[0]:
            of_source = read_plain_labels(source)
        else:
            label_set = read_labels(source)
            of_source = label_set.labels
            manifests.append(label_set.manifest)
        for label in of_source:
            if wanted.get(label.set, True):
                labels.append(label)
            else:
                left_out[label.set] += 1
    for set_name, count in left_out.items():
        say(f"labels: leaving out {count} rows of {set_name}; --{OPTIONAL_SETS[set_name]} uses them")
    _check_same_model(sources, manifests)
    for set_name, flag in OPTIONAL_SETS.items():
        if wanted[set_name] and not any(label.set == set_name for label in labels):
            raise UserError(
                f"--{flag} was given, but {shown} has no rows of {set_name}; make them with "
                f"data_generation.py --dataset {set_name}"
            )
    if not labels:
        raise UserError(f"no labels to train on in {shown}")
    _check_labels_together(labels, shown)
    return TrainingLabels(labels, manifests)


def _is_plain(source: Path) -> bool:
    """Whether `source` holds labels without a manifest; UserError when it holds none at all."""
    if source.is_dir():
        return not (source / MANIFEST).exists() and not (source / PROGRESS).exists() and holds_labels(source)
    if source.exists() and source.suffix not in (".jsonl", ".json"):
        raise UserError(f"--data {source} is a file; pass the folder that data_generation.py wrote, or a .jsonl file")
    if source.name == LABELS and (source.parent / MANIFEST).exists():
        raise UserError(f"--data {source}: pass its folder, {source.parent}, which holds the {MANIFEST} too")
    return source.exists()


def _check_same_model(sources: Sequence[str], manifests: Sequence[Manifest]) -> None:
    for source, manifest in zip(sources[1:], manifests[1:], strict=False):
        for name in ("model_fingerprint", "num_layers", "dtype", "chat_template"):
            value, first = getattr(manifest, name), getattr(manifests[0], name)
            if value != first:
                raise UserError(
                    f"the labels in {source} have {name} {value!r}, those in {sources[0]} {first!r}; labels of "
                    "different models cannot train one set of routers"
                )


def _check_labels_together(labels: Sequence[Label], shown: str) -> None:
    identities = Counter((label.set, label.question_id) for label in labels)
    repeated = [identity for identity, count in identities.items() if count > 1]
    if repeated:
        raise UserError(
            f"question {shorten('/'.join(repeated[0]))} has labels twice in {shown}; name each folder once, and label "
            "each question once"
        )
    lengths = {len(label.path) for label in labels}
    if len(lengths) > 1:
        raise UserError(f"{shown}: the paths have {min(lengths)} to {max(lengths)} entries; one model has one number")


def make_examples(
    labels: TrainingLabels, tokenizer, paths: str = "best", chat_template: bool | None = None
) -> list[Example]:
    """One example per question (its best path), or one per good path (`paths="all"`).

    Prompts are tokenised as in the search: special tokens are added unless a chat template brought its own BOS.

    Args:
        labels: labels with a `prompt`, or without one, whose question is then the prompt.
        tokenizer: tokenizer of the base model.
        paths: "best" or "all".
        chat_template: whether the question of labels without a prompt is rendered as the user's turn.
    """
    examples = []
    for label in labels.labels:
        prompt = label.prompt or apply_template(label.question, tokenizer, bool(chat_template))
        special = adds_special_tokens(prompt, tokenizer)
        token_ids = tuple(tokenizer(prompt, add_special_tokens=special)["input_ids"])
        chosen = [label.path]
        if paths == "all":
            chosen += [path for path in label.good_paths if path != label.path]
        examples += [Example(f"{label.set}/{label.question_id}", token_ids, path) for path in chosen]
    return examples


def split_by_question(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, held-out) indices; all examples of a question are on the same side.

    At least one question is held out when fraction > 0 and there are two; a single question is a training question.
    """
    questions = sorted({e.question for e in examples})
    random.Random(seed).shuffle(questions)
    count = 0
    if fraction > 0 and len(questions) > 1:
        count = min(max(1, round(fraction * len(questions))), len(questions) - 1)
    held_out = set(questions[:count])
    train = [i for i, e in enumerate(examples) if e.question not in held_out]
    return train, [i for i, e in enumerate(examples) if e.question in held_out]
