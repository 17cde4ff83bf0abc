"""One path per group of similar questions, and routers that learn these paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from drllm.group_paths.margin_rewards import MarginRewards, RewardRound
from drllm.group_paths.router_training import imitate, refine
from drllm.processes import Made, from_main
from drllm.rollouts.routed_paths import routed_paths
from drllm.training.router_modules import StackedRouters
from extensions.groups.grouping import groups_of, smoothed
from train_models.paths import EXECUTE, REPEAT, SKIP, Path, default_path, is_allowed


@dataclass(frozen=True)
class GroupPath:
    """A path and the mean reward of its group's questions along it."""

    path: Path
    reward: float


def describe_edits(path: Path) -> str:
    """The edits of a path, e.g. "skip 19, repeat 27"; "" for the default path."""
    edits = [
        f"{'skip' if visits == SKIP else 'repeat'} {block}" for block, visits in enumerate(path) if visits != EXECUTE
    ]
    return ", ".join(edits)


def path_of_edits(edits: str, num_blocks: int) -> Path:
    """The inverse of `describe_edits`.

    Raises:
        ValueError: `edits` has another form, or names a block that does not exist.
    """
    path = list(default_path(num_blocks))
    for action, block in parse_edits(edits):
        if block >= num_blocks:
            raise ValueError(f"the model has only {num_blocks} blocks, from 0 on")
        path[block] = action
    return tuple(path)


def parse_edits(edits: str) -> list[tuple[int, int]]:
    """The (action, block) pairs of "skip 19, repeat 27"; none of "".

    Raises:
        ValueError: `edits` has another form.
    """
    if edits and not re.fullmatch(r"(skip|repeat) \d+(, (skip|repeat) \d+)*", edits):
        raise ValueError(f'{edits!r} is not a list of edits, such as "skip 18, repeat 27"')
    pairs = (edit.split() for edit in filter(None, edits.split(", ")))
    return [({"skip": SKIP, "repeat": REPEAT}[action], int(block)) for action, block in pairs]


def grow(
    measure_around: Callable[[list[Path], int], RewardRound], groups: torch.Tensor, first: RewardRound, most_skips: int
) -> list[list[GroupPath]]:
    """For each group its paths of 0, 1, ... skips, each the former and the skip that leaves the highest mean reward.

    Args:
        measure_around: (one path per question, their number of skips) -> the round around these paths.
        groups: [N], the group of each question.
        first: the round around the default path.
        most_skips: of a path; a chain ends earlier where no further skip is allowed.
    """
    count = int(groups.max()) + 1
    paths = [first.paths[0]] * count
    chains: list[list[GroupPath]] = [[] for _ in range(count)]
    measured = first
    open_groups = set(groups.tolist())
    for skips in range(most_skips + 1):
        if skips:
            measured = measure_around([paths[group] for group in groups.tolist()], skips)
        for group in sorted(open_groups):
            members = groups == group
            path = paths[group]
            chains[group].append(GroupPath(path, float(measured.own()[members].mean())))
            means = measured.rewards[members, :, SKIP].mean(0)
            options = [(*path[:block], SKIP, *path[block + 1 :]) for block in range(len(path))]
            allowed = [b for b, other in enumerate(options) if path[b] != SKIP and sum(other) and is_allowed(other)]
            if allowed:
                paths[group] = options[max(allowed, key=lambda block: float(means[block]))]
            else:
                open_groups.remove(group)
    return chains


def at_price(chains: Sequence[Sequence[GroupPath]], groups: torch.Tensor, price: float) -> list[Path]:
    """The label of each question: its group's path with the highest mean reward plus `price` per skipped block."""

    def value(member: GroupPath) -> float:
        return member.reward + price * member.path.count(SKIP)

    return [max(chains[group], key=value).path for group in groups.tolist()]


class PathsOfGroups:
    """Steps 1 to 4, done once for the questions of `rewards`; then labels and routers at any price.

    Where `rewards` has a `RoundStore`, nothing is measured twice and several processes share the measuring; the main
    process then trains the routers and sends them to the others.

    Attributes:
        groups: [N], the group of each question.
        chains: per group its paths of 0, 1, ... skips.
    """

    def __init__(self, rewards: MarginRewards, groups: int = 20, most_skips: int = 4) -> None:
        self.rewards = rewards
        default = default_path(rewards.routed.config.num_hidden_layers)
        first = rewards.around([default] * len(rewards.questions), title="around the base model")
        effects = first.rewards[:, :, SKIP] - first.rewards[:, :, EXECUTE]
        self.groups = self._from_main(
            lambda: groups_of(smoothed(effects, first.windows, first.window_mask), groups, seed=0)
        )

        def measure_around(paths: list[Path], skips: int) -> RewardRound:
            title = f"around paths of {skips} skips, at most {most_skips}"
            return rewards.around(paths, with_windows=False, title=title)

        self.chains = grow(measure_around, self.groups, first, most_skips)

    def labels(self, price: float) -> list[Path]:
        """One path per question, at `price` in reward per skipped block."""
        return at_price(self.chains, self.groups, price)

    def train_routers(self, price: float, seed: int) -> None:
        """Steps 5 and 6 from the initial weights of `seed`; leaves the routers in the model."""
        rewards = self.rewards
        rewards.routed.model.init_routers(seed)
        routers = StackedRouters(rewards.routed.model.routers).cpu()
        along = rewards.around(self.labels(price), actions=(), title="along the groups' paths")
        self._train(routers, lambda: imitate(routers, along, epochs=10, learning_rate=1e-3, seed=seed))
        prompts = [question.prompt for question in rewards.questions]
        paths = self._from_main(lambda: routed_paths(rewards.routed, prompts, rewards.batch_size))
        around = rewards.around(paths, title="around the routers' decisions")
        self._train(routers, lambda: refine(routers, around, price, epochs=4, learning_rate=3e-4, seed=seed))

    def _from_main(self, make: Callable[[], Made]) -> Made:
        store = self.rewards.store
        return make() if store is None else from_main(store.state, make)

    def _train(self, routers: StackedRouters, train: Callable[[], float]) -> None:
        """Trains on the main process; afterwards all processes have the routers, and their models, too."""

        def weights() -> dict[str, torch.Tensor]:
            train()
            return routers.state_dict()

        routers.load_state_dict(self._from_main(weights))
        routers.copy_to(self.rewards.routed.model.routers)
