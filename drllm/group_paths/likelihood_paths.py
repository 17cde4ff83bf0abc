"""Paths of groups on a large model: edits that cost too much are dropped early, repeats are allowed.

All single edits of all questions would be 2 L rollouts per question and round. Most edits of a pretrained model cost
far more than any price, and a few questions show that. So the rounds get narrower:

1. Pilot: every skip and repeat, on the first `pilot` questions of each set. The `keep` most promising edits stay.
2. First round: these edits around the default path, on all questions. Their effects, smoothed over similar questions,
   form the groups.
3. Growth: from the default path on, each group adds the edit that is worth most; before each step only its `candidates`
   best edits are measured around its present path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drllm.group_paths.grouping import groups_of, smoothed
from drllm.group_paths.likelihood_rewards import LikelihoodRewards
from drllm.group_paths.margin_rewards import RewardRound
from drllm.group_paths.paths import GroupPath
from drllm.group_paths.router_training import imitate
from drllm.processes import from_main
from drllm.training.router_modules import StackedRouters
from train_models.paths import EXECUTE, REPEAT, SKIP, Path, default_path, is_allowed

SHRINKAGE = 40  # questions of a set that weigh as much as the mean over all sets, in the pilot


@dataclass(frozen=True)
class Growth:
    """How paths of groups are found.

    Attributes:
        groups: of similar questions, at most.
        pilot: questions per set on which every edit is tried.
        keep: edits that are measured on all questions.
        candidates: edits that a group tries before each further step.
        max_edits: of a path.
        price: reward that one block application less may cost, and that one more must gain.
    """

    groups: int = 6
    pilot: int = 40
    keep: int = 12
    candidates: int = 6
    max_edits: int = 4
    price: float = 0.01

    def __post_init__(self) -> None:
        for name in ("groups", "pilot", "keep", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_edits < 0:
            raise ValueError(f"max_edits is {self.max_edits}; it must be at least 0")


def promising_edits(effects: torch.Tensor, sets: Sequence[str], keep: int) -> torch.Tensor:
    """The `keep` edits with the highest mean effect in any set, each set's mean shrunk towards that of all.

    Args:
        effects: [N, L, 3], change of the reward by an edit; NaN where it was not measured.
        sets: the set of each question.
        keep: number of edits.

    Returns:
        bool [L, 3].
    """
    overall = effects.nanmean(0)
    best = torch.full_like(overall, -torch.inf)
    for name in dict.fromkeys(sets):
        members = torch.tensor([other == name for other in sets])
        measured = effects[members]
        count = measured.isfinite().sum(0)
        mean = (measured.nan_to_num(0.0).sum(0) + SHRINKAGE * overall) / (count + SHRINKAGE)
        best = torch.maximum(best, mean.nan_to_num(-torch.inf))
    chosen = best.flatten().topk(min(keep, int(best.isfinite().sum()))).indices
    edits = torch.zeros(best.numel(), dtype=torch.bool)
    edits[chosen] = True
    return edits.view_as(best)


class LikelihoodPaths:
    """Labels of groups of similar multiple-choice questions.

    Args:
        rewards: of the training questions.
        growth: how paths are found.

    Attributes:
        edits: bool [L, 3], the edits that were measured on all questions.
        groups: int64 [N].
        chains: for each group its paths of 0, 1, ... edits.
    """

    def __init__(self, rewards: LikelihoodRewards, growth: Growth) -> None:
        self.rewards = rewards
        self.growth = growth
        sets = [prompt.question.set for prompt in rewards.prompts]
        num_blocks = rewards.routed.config.num_hidden_layers
        default = [default_path(num_blocks)] * len(sets)
        self.edits = self._pilot(sets, default)
        first = rewards.around(default, self.edits.expand(len(sets), -1, -1), title="first round")
        effects = (first.rewards - first.own()[:, None, None])[:, self.edits]
        self.groups = from_main(
            rewards.state,
            lambda: groups_of(smoothed(effects, first.windows, first.window_mask), growth.groups, seed=0),
        )
        self.chains = self._grow(first)

    def labels(self, price: float | None = None) -> list[Path]:
        """One path per question: its group's path that is worth most at `price` (default: that of the growth)."""
        price = self.growth.price if price is None else price
        best = [max(chain, key=lambda member: member.reward - price * sum(member.path)).path for chain in self.chains]
        return [best[group] for group in self.groups.tolist()]

    def train_routers(self, labels: Sequence[Path], seed: int, epochs: int = 25) -> None:
        """Trains routers on `labels` from the initial weights of `seed`, and leaves them in the model.

        The main process trains; the others receive the routers.
        """
        model = self.rewards.routed.model
        model.init_routers(seed)
        routers = StackedRouters(model.routers).cpu()
        along = RewardRound(list(labels), torch.empty(0), *self.rewards.windows(labels))

        def weights() -> dict[str, torch.Tensor]:
            imitate(routers, along, epochs=epochs, learning_rate=1e-3, seed=seed)
            return routers.state_dict()

        routers.load_state_dict(from_main(self.rewards.state, weights))
        routers.copy_to(model.routers)

    def _pilot(self, sets: list[str], default: list[Path]) -> torch.Tensor:
        edits = torch.zeros(len(default[0]), 3, dtype=torch.bool)
        edits[:, [SKIP, REPEAT]] = True
        seen: dict[str, int] = {}
        in_pilot = []
        for name in sets:
            seen[name] = seen.get(name, 0) + 1
            in_pilot.append(seen[name] <= self.growth.pilot)
        wanted = edits & torch.tensor(in_pilot)[:, None, None]
        measured = self.rewards.around(default, wanted, with_windows=False, title="pilot: every edit")
        effects = measured.rewards - measured.own()[:, None, None]
        effects[:, :, EXECUTE] = torch.nan
        # An edit is worth its effect less the price of the block applications that it adds.
        prices = self.growth.price * torch.tensor([action - EXECUTE for action in (SKIP, EXECUTE, REPEAT)])
        return promising_edits(effects - prices, sets, self.growth.keep)

    def _grow(self, first: RewardRound) -> list[list[GroupPath]]:
        groups = self.groups.tolist()
        count = max(groups) + 1
        paths = [first.paths[0]] * count
        members = [self.groups == group for group in range(count)]
        chains = [[GroupPath(paths[g], float(first.own()[members[g]].mean()))] for g in range(count)]
        edits = [self.edits.clone() for _ in range(count)]
        around = first
        for step in range(self.growth.max_edits):
            for group in range(count):
                means = around.rewards[members[group]].nanmean(0)
                ranked = self._ranked(paths[group], edits[group], means)
                # Only the best edits of this step are tried around the next path.
                edits[group] = torch.zeros_like(self.edits)
                for _, block, action in ranked[: self.growth.candidates + 1]:
                    edits[group][block, action] = True
                if ranked:
                    _, block, action = ranked[0]
                    paths[group] = (*paths[group][:block], action, *paths[group][block + 1 :])
            wanted = torch.stack([edits[group] for group in groups])
            if step + 1 == self.growth.max_edits:
                wanted = torch.zeros_like(wanted)
            title = f"growth, step {step + 1} of {self.growth.max_edits}"
            around = self.rewards.around([paths[g] for g in groups], wanted, with_windows=False, title=title)
            for group in range(count):
                if paths[group] != chains[group][-1].path:
                    chains[group].append(GroupPath(paths[group], float(around.own()[members[group]].mean())))
        return chains

    def _ranked(self, path: Path, edits: torch.Tensor, means: torch.Tensor) -> list[tuple[float, int, int]]:
        """(value, block, action) of the measured edits that change `path`, the best first."""
        ranked = []
        for block, action in edits.nonzero().tolist():
            other = (*path[:block], action, *path[block + 1 :])
            mean = float(means[block, action])
            if path[block] == EXECUTE and is_allowed(other) and mean == mean:
                ranked.append((mean - self.growth.price * sum(other), block, action))
        return sorted(ranked, reverse=True)
