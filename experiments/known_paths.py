"""The known paths of the positive control (miniature/positive_control) and routers that imitate them.

The control's base model was trained along one path per kind of question. A question file of the miniature says the kind
of each question; neither the model nor a router sees it.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from drllm.errors import UserError
from drllm.evaluation.outcomes import Outcome
from drllm.group_paths.margin_rewards import MarginRewards
from drllm.group_paths.router_training import imitate
from drllm.questions.prompts import Prompt
from drllm.questions.sets import SETS, Question
from drllm.training.router_modules import StackedRouters
from miniature.training_paths import read_known_paths
from train_models.paths import SKIP, default_path
from train_models.paths import Path as BlockPath

Group = TypeVar("Group", str, BlockPath)
EPOCHS, LEARNING_RATE = 10, 1e-3  # as for the paths of groups


class KnownPaths:
    """The known path of each question.

    Args:
        file: JSON, kind -> digits of the path.
        data_dir: question files of the miniature, whose rows name the kind.
        num_blocks: L of the model.

    Raises:
        UserError: the file is not valid or its paths are not of `num_blocks` blocks.
    """

    def __init__(self, file: Path, data_dir: Path, num_blocks: int) -> None:
        try:
            self._paths = read_known_paths(file)
        except (OSError, ValueError) as error:
            raise UserError(f"--known_paths: {error}") from None
        lengths = {len(path) for path in self._paths.values()}
        if lengths != {num_blocks}:
            raise UserError(f"--known_paths {file}: paths of {lengths.pop()} blocks, but the model has {num_blocks}")
        self._data_dir = data_dir
        self._kinds: dict[tuple[str, str], dict[tuple, str]] = {}

    def kind_of(self, question: Question, split: str) -> str:
        """The kind that the question file of `split` ("train" or "test") names.

        Raises:
            UserError: the file does not hold the question, or names no kind of the miniature.
        """
        kinds = self._kinds_of(question.set, split)
        kind = kinds.get((question.text, question.choices))
        if kind not in self._paths:
            raise UserError(
                f"{self._data_dir}: no kind for the question {question.text!r}; make the files with "
                "`python miniature/make.py questions`"
            )
        return kind

    def of(self, prompts: Sequence[Prompt], split: str) -> list[BlockPath]:
        """The known path of each prompt's question."""
        return [self._paths[self.kind_of(prompt.question, split)] for prompt in prompts]

    def _kinds_of(self, set_name: str, split: str) -> dict[tuple, str]:
        spec = SETS[set_name]
        if (spec.stem, split) not in self._kinds:
            file = self._data_dir / f"{spec.stem}_{spec.splits[split]}.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            self._kinds[spec.stem, split] = dict(map(_kind_of_row, rows))
        return self._kinds[spec.stem, split]


def _kind_of_row(row: dict) -> tuple[tuple[str, tuple[str, ...]], str]:
    """((text, options), kind) of a row as miniature.questions.row writes it."""
    if "choices" in row:
        return (row["question"], tuple(row["choices"]["text"])), row["id"].rsplit("-", 1)[1].replace("_", " ")
    return (row["query"], ()), row["query_metadata"]["subject"]


def train_on_known_paths(rewards: MarginRewards, paths: Sequence[BlockPath], seed: int) -> None:
    """Trains the routers of `rewards.routed` by cross-entropy on `paths`, one path per question of `rewards`."""
    rewards.routed.model.init_routers(seed)
    routers = StackedRouters(rewards.routed.model.routers).cpu()
    along = rewards.around(paths, actions=(), title="along the known paths")
    imitate(routers, along, EPOCHS, LEARNING_RATE, seed)
    routers.copy_to(rewards.routed.model.routers)


def of_other_questions(labels: Sequence[BlockPath], known: Sequence[BlockPath], seed: int = 0) -> list[BlockPath]:
    """For each question the label of a random question of the same kind, which is to say of the same known path."""
    shuffled = list(labels)
    generator = random.Random(seed)
    for members in _members(known).values():
        order = generator.sample(members, len(members))
        for index, other in zip(order, order[1:] + order[:1], strict=True):
            shuffled[index] = labels[other]
    return shuffled


def most_frequent(labels: Sequence[BlockPath], known: Sequence[BlockPath]) -> list[BlockPath]:
    """For each question, block by block, the most frequent action among the labels of its kind.

    This is what a router would decide that tells the kinds apart and knows nothing else of the question.
    """
    decided = list(labels)
    for members in _members(known).values():
        blocks = zip(*(labels[index] for index in members), strict=True)
        path = tuple(Counter(actions).most_common(1)[0][0] for actions in blocks)
        for index in members:
            decided[index] = path
    return decided


def _members(groups: Sequence[Group]) -> dict[Group, list[int]]:
    """The questions of each group, which is named by its known path or its kind."""
    members: dict[Group, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return members


def label_quality(
    labels: Sequence[BlockPath],
    kinds: Sequence[str],
    known: Sequence[BlockPath],
    answer: Callable[[Sequence[BlockPath]], Outcome],
) -> dict:
    """What the labels of a search are worth to questions other than their own.

    Args:
        labels, kinds, known: of the questions that the labels were made from.
        answer: answers these questions along one path each.

    Returns:
        "followed": accuracy and layers of the default path, the labels, the label of another question of the same
        kind, each block's most frequent label in the kind, and the known paths. "agreement": with the known paths, of
        all labels; "kinds": of each kind's.
    """
    followed = {
        "base": [default_path(len(known[0]))] * len(known),
        "own label": labels,
        "label of another question of its kind": of_other_questions(labels, known),
        "most frequent label of its kind, block by block": most_frequent(labels, known),
        "known path": known,
    }
    outcomes = {name: answer(paths) for name, paths in followed.items()}
    return {
        "followed": {name: {"accuracy": o.accuracy, "layers": o.mean_layers} for name, o in outcomes.items()},
        "agreement": agreement(labels, known),
        "kinds": {
            kind: agreement([labels[index] for index in members], [known[index] for index in members])
            for kind, members in _members(kinds).items()
        },
    }


def agreement(labels: Sequence[BlockPath], known: Sequence[BlockPath]) -> dict[str, float]:
    """How labels compare with the known paths of the same questions.

    Returns:
        Shares: "equal" of whole paths, "blocks" of equal actions, "skips_found" of known skips that the label skips
        too, "skips_right" of the label's skips that are known ones.
    """
    pairs = [pair for label, path in zip(labels, known, strict=True) for pair in zip(label, path, strict=True)]
    both = pairs.count((SKIP, SKIP))
    return {
        "questions": len(labels),
        "equal": sum(label == path for label, path in zip(labels, known, strict=True)) / len(labels),
        "blocks": sum(a == b for a, b in pairs) / len(pairs),
        "skips_found": both / max(1, sum(path == SKIP for _, path in pairs)),
        "skips_right": both / max(1, sum(label == SKIP for label, _ in pairs)),
    }
