"""How a comparison asks and judges: as the labels of the checkpoints were made, or as the command line says."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState

from drllm.arguments import add_shared, check_ranges
from drllm.checkpoints import checkpoint_info, load_config, load_routed, load_tokenizer
from drllm.errors import UserError
from drllm.files import read_json
from drllm.manifests import Manifest, read_checkpoint_manifests
from drllm.miniature import MINIATURE_DATA, MINIATURE_MODEL
from drllm.provenance import dtype_on, parse_dtype
from drllm.questions.overlap import load_training_questions
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import Question, expand_sets, load_questions
from drllm.rollouts.rewards import REWARDS, Reward, reward_named
from drllm.search.selection import seeded_order
from extensions.baselines.bench import Bench

DEFAULT_SETS = "arc,dart"
QUESTIONS_EXAMPLE = '{"arc_easy": ["id", ...]}'


def add_protocol_arguments(parser: argparse.ArgumentParser, train_questions: int) -> None:
    """Adds what `Protocol.of` and `load_parts` read; `train_questions` is the default of that argument."""
    add, of_labels = parser.add_argument, "as the checkpoints' labels were made"
    add("--checkpoint", action="append", default=[], help="NAME=FOLDER of a routed checkpoint; repeatable")
    add_shared(parser, "model", says=f"{of_labels}, or the miniature")
    for name in ("dtype", "data_dir", "dataset"):
        add_shared(parser, name, says=of_labels)
    add_shared(parser, "reward", says=of_labels, choices=REWARDS)
    add_shared(parser, "unlike", "")
    add("--questions", type=Path, help="JSON, set -> ids of training questions to test on (default: the test split)")
    add("--test_questions", type=int, help="test questions per set (default: all)")
    add(
        "--train_questions",
        type=int,
        default=train_questions,
        help="training questions per set (default: %(default)s)",
    )


def check_protocol_arguments(arguments: argparse.Namespace) -> None:
    """Checks the arguments of `add_protocol_arguments` before anything is loaded.

    Raises:
        UserError: a number out of range, a checkpoint without a name, an unknown set.
    """
    check_ranges(arguments, train_questions=(1, math.inf), test_questions=(2, math.inf))
    for checkpoint in arguments.checkpoint:
        if not all(checkpoint.partition("=")[::2]):
            raise UserError(f"--checkpoint {checkpoint}: expected NAME=FOLDER")
    for sets in filter(None, (arguments.dataset, arguments.unlike)):
        expand_sets(sets)


@dataclass(frozen=True)
class Protocol:
    """The base model, its dtype, the reward, the form of prompts and responses, and where questions come from."""

    model: str
    revision: str | None
    dtype: torch.dtype
    reward: Reward
    chat_template: bool
    response_format: ResponseFormat
    data_dir: Path | None
    sets: tuple[str, ...]

    @classmethod
    def of(cls, arguments: argparse.Namespace, state: PartialState) -> Protocol:
        """The protocol of the checkpoints' labels; arguments that are given win.

        Raises:
            UserError: a folder is not a routed checkpoint, checkpoints of different protocols, or sets that the reward
                cannot judge.
        """
        folders = [checkpoint.partition("=")[2] for checkpoint in arguments.checkpoint]
        for folder in folders:
            checkpoint_info(folder).require_routers()
        labels = [(folder, manifest) for folder in folders for manifest in read_checkpoint_manifests(Path(folder))]
        first = made_alike(labels) if labels else Manifest()
        model = arguments.model or first.model or str(MINIATURE_MODEL)
        reward = reward_named(arguments.reward or first.reward)
        if labels:
            chat = first.chat_template
        else:
            stop_ids = load_config(model).eos_token_id
            chat, _ = reward.uses_chat_template("auto", model, load_tokenizer(model), stop_ids)
        dtype = arguments.dtype or first.dtype
        sets = expand_sets(arguments.dataset or ",".join(first.arguments.get("dataset", [])) or DEFAULT_SETS)
        reward.check_sets(sets)
        data_dir = arguments.data_dir
        if data_dir is None and labels:
            data_dir = Path(first.data_dir) if first.data_dir else None
        elif data_dir is None and model == str(MINIATURE_MODEL):
            data_dir = MINIATURE_DATA
        return cls(
            model,
            None if arguments.model else first.revision,
            parse_dtype(dtype) if dtype else dtype_on(state.device, "auto"),
            reward,
            chat,
            first.response_format,
            data_dir,
            tuple(sets),
        )

    def bench(
        self,
        questions: tuple[Sequence[Question], Sequence[Question]],
        folder: Path,
        batch_size: int,
        device: torch.device,
    ) -> Bench:
        """The base model and (training questions, test questions) in this form.

        Raises:
            UserError: the model cannot be read; see `Bench`.
        """
        routed = load_routed(self.model, self.dtype, self.revision, {}).eval().to(device)
        tokenizer = load_tokenizer(self.model, self.revision)
        form = (self.chat_template, self.response_format)
        return Bench(routed, tokenizer, self.reward, questions, folder, batch_size, form)


def made_alike(labels: Sequence[tuple[str, Manifest]]) -> Manifest:
    """The first manifest of labels, each given with the name of its folder.

    Raises:
        UserError: labels of another dtype, reward, chat template or response format than the first ones.
    """
    (first_folder, first), *others = labels
    for folder, manifest in others:
        for name in ("dtype", "reward", "chat_template", "response_format"):
            value, of_first = getattr(manifest, name), getattr(first, name)
            if value != of_first:
                raise UserError(
                    f"the labels of {folder} have {name} {value!r}, those of {first_folder} {of_first!r}; use labels "
                    "of one kind"
                )
    return first


def load_parts(arguments: argparse.Namespace, protocol: Protocol) -> tuple[list[Question], list[Question]]:
    """(training questions, test questions) of a comparison.

    Raises:
        UserError: a set has no such questions, or the file of --questions is damaged or names unknown ones.
    """
    unlike = expand_sets(arguments.unlike) if arguments.unlike else ()
    of_sets = load_training_questions(protocol.sets, protocol.data_dir, unlike)
    test: list[Question] = []
    if arguments.questions is None:
        for name in protocol.sets:
            test += load_questions(name, "test", protocol.data_dir)[: arguments.test_questions]
    else:
        ids = read_json(arguments.questions, f"write, for example, {QUESTIONS_EXAMPLE}")
        for name in protocol.sets:
            wanted = set(ids.get(name, ()))
            chosen = [
                question for question in load_questions(name, "train", protocol.data_dir) if question.id in wanted
            ]
            if missing := wanted - {question.id for question in chosen}:
                raise UserError(f"--questions {arguments.questions}: {name} has no question {sorted(missing)[0]!r}")
            test += chosen[: arguments.test_questions]
            of_sets[name] = [question for question in of_sets[name] if question.id not in wanted]
    train = [
        question
        for of_set in of_sets.values()
        for question in seeded_order(of_set, arguments.seed)[: arguments.train_questions]
    ]
    return train, test
