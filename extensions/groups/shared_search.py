"""The published tree search with one reward for a group of similar questions.

The published search (Section 4) asks for each question by itself which path makes it right. Among fifty paths one
nearly always does, and mostly by luck: on the next question of its kind it is wrong, so routers cannot learn when to
take it. Here the same search runs once per group, and the reward of a path is the mean over questions of the group:

1. The tree sees the mean reward of `search_questions` questions of the group. Reading off the path that did best there
   would reward luck again, only on a smaller scale (the winner's curse).
2. So the best `finalists` paths are measured on all questions of the group, paired with the default path. The one whose
   gain, less the price of its block applications and less `caution` standard errors, is highest becomes the label of
   every question of the group. If no gain is left the group keeps the default path.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from drllm.search.tree import PathSearch, SearchSettings, question_seed
from train_models.paths import Path

# (questions, one path each) -> the reward of each question along its path, in [0, 1]
Measure = Callable[[Sequence[int], Sequence[Path]], Sequence[float]]


@dataclass(frozen=True)
class SharedSettings:
    """How the path of a group is searched and chosen.

    Attributes:
        tree: settings of the search. `stop_at` is always "never": no single answer ends the search of a group.
        search_questions: most questions of a group whose mean reward the tree sees; at most half of a group.
        finalists: paths that are measured on all questions of the group.
        price: reward that one block application less may cost, and that one more must gain.
        caution: standard errors by which a path's gain must exceed its price.
        seed: seed for the choice of questions and for the searches.
    """

    tree: SearchSettings = field(default_factory=SearchSettings)
    search_questions: int = 32
    finalists: int = 16
    price: float = 0.01
    caution: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class GroupLabel:
    """The path of a group, and how it was found.

    Attributes:
        questions: questions of the group, as the caller numbers them.
        path: the label of all of them.
        gain, error: mean reward along `path` less that along the default path, over all questions of the group, and its
            standard error; 0 for the default path.
        simulations, inferences: cost of the group's search; an inference is one path along all questions of the search.
    """

    questions: tuple[int, ...]
    path: Path
    gain: float
    error: float
    simulations: int
    inferences: int


class _OpenGroup:
    """A group while it is searched."""

    def __init__(self, number: int, questions: Sequence[int], num_blocks: int, settings: SharedSettings) -> None:
        self.questions = tuple(questions)
        own_seed = question_seed(settings.seed, f"group {number}")
        shuffled = random.Random(own_seed).sample(self.questions, len(self.questions))
        self.searched_on = shuffled[: max(1, min(settings.search_questions, len(shuffled) // 2))]
        self.search = PathSearch(num_blocks, replace(settings.tree, stop_at="never"), own_seed)
        self.finalists: dict[Path, Sequence[float]] = {}  # with the rewards of all questions

    def label(self, settings: SharedSettings) -> GroupLabel:
        """The label of the group, once its finalists are measured."""
        chosen = choose(self.finalists, self.search.root.path, settings)
        return GroupLabel(self.questions, *chosen, self.search.simulations, len(self.search.rewards))


def search_groups(
    groups: dict[int, Sequence[int]],
    num_blocks: int,
    settings: SharedSettings,
    measure: Measure,
    after_round: Callable[[int], None] = lambda steps: None,
) -> dict[int, GroupLabel]:
    """One label per group. The searches run side by side, so that their questions fill batches.

    The result of a group depends on its number, its questions, the settings and the rewards, not on other groups.

    Args:
        groups: number of a group -> its questions, at least one.
        num_blocks: L of the model.
        settings: settings of every group.
        measure: rewards of questions along paths; it is asked for some of them twice and should remember them.
        after_round: called after each round with the steps that it took: simulations, then finalists; `num_simulations`
            and `finalists` for each group.
    """
    open_groups = {number: _OpenGroup(number, members, num_blocks, settings) for number, members in groups.items()}
    while waiting := [group for group in open_groups.values() if group.search.request is not None]:
        before = sum(group.search.simulations for group in waiting)
        rewards = _of_each(measure, [(group.searched_on, group.search.request) for group in waiting])
        for group, values in zip(waiting, rewards, strict=True):
            group.search.tell(statistics.mean(values))
        after_round(sum(group.search.simulations for group in waiting) - before)
    for group in open_groups.values():
        ranked = group.search.ranked(settings.price)[: settings.finalists]
        group.finalists = dict.fromkeys([group.search.root.path, *ranked], ())
    for place in range(settings.finalists + 1):
        waiting = [group for group in open_groups.values() if place < len(group.finalists)]
        if not waiting:
            break
        asked = [(group.questions, list(group.finalists)[place]) for group in waiting]
        for group, (_, path), rewards in zip(waiting, asked, _of_each(measure, asked), strict=True):
            group.finalists[path] = rewards
        after_round(len(open_groups) if place else 0)
    return {number: group.label(settings) for number, group in open_groups.items()}


def choose(measured: dict[Path, Sequence[float]], default: Path, settings: SharedSettings) -> tuple[Path, float, float]:
    """(path, its gain over the default path, the gain's standard error); the default path unless a gain is left.

    Args:
        measured: path -> rewards of the same questions, in the same order; holds `default`.
        default: the default path.
        settings: price and caution.
    """
    best, most = (default, 0.0, 0.0), 0.0
    for path, rewards in measured.items():
        if path == default or len(rewards) < 2:
            continue
        gains = [reward - base for reward, base in zip(rewards, measured[default], strict=True)]
        gain, error = statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
        worth = gain - settings.price * (sum(path) - len(path)) - settings.caution * error
        if worth > most:
            best, most = (path, gain, error), worth
    return best


def _of_each(measure: Measure, asked: Sequence[tuple[Sequence[int], Path]]) -> list[list[float]]:
    """The rewards of each (questions, path), all measured in one call."""
    rewards = iter(
        measure(
            [question for questions, _ in asked for question in questions],
            [path for questions, path in asked for _ in questions],
        )
    )
    return [[next(rewards) for _ in questions] for questions, _ in asked]
