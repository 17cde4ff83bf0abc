"""Paths of groups on a large model: repeats are allowed, and edits that cost too much are dropped early.

Each group starts from the default path and adds one edit (a skip or a repeat) per step. To try every edit on every
question would be 2 L rollouts per question and step, most of them for edits that cost far more than any price. So a
step is a sequence of heats (successive halving): the first heat tries many edits on few questions, each further heat
the better half of the edits on twice as many questions. An edit is adopted only if its gain exceeds its price by
`caution` standard errors; otherwise the group's path is complete. Growing at further prices leads to other paths.
Questions set aside for validation then choose among the paths of the chain and the best of all that were measured on
every training question of the group.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

import torch

from drllm.errors import UserError
from drllm.group_paths.likelihood_rewards import LikelihoodRewards
from drllm.group_paths.margin_rewards import RewardRound
from drllm.group_paths.paths import GroupPath, describe_edits
from drllm.group_paths.router_training import PURE_ROUTER, fit_domains, imitate, knob_that_keeps
from drllm.processes import from_main
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.training.router_modules import StackedRouters
from extensions.groups.grouping import groups_of, standardised_states
from train_models.paths import EXECUTE, REPEAT, SKIP, Path, default_path, is_allowed

Edit = tuple[int, int]  # (block, action)
PRICE_STEP = 1e-9  # above the price at which two paths are worth the same, the shorter one is worth more


@dataclass(frozen=True)
class Growth:
    """How paths of groups are found.

    Attributes:
        pilot: questions per group on which all edits are tried; every heat costs as many scores.
        keep: edits that survive the first heat of the first step, which tries all of them.
        candidates: edits that a group tries in each further step.
        finalists: edits that are measured on all questions of a group, at least.
        max_edits: of a path.
        price: reward that one block application less may cost, and that one more must gain.
        caution: standard errors by which an edit's gain must exceed its price.
        further_prices: prices at which paths are grown, too; `price` alone chooses.
        nominees: paths off the chain that validation questions choose among; the best of those that were measured on
            all training questions of a group, at any price. Without validation questions there are none: the training
            questions would choose the path on which they were luckiest.
    """

    pilot: int = 40
    keep: int = 12
    candidates: int = 6
    finalists: int = 3
    max_edits: int = 4
    price: float = 0.01
    caution: float = 0.0
    further_prices: tuple[float, ...] = ()
    nominees: int = 3

    def __post_init__(self) -> None:
        for name in ("pilot", "keep", "candidates", "finalists"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_edits", "nominees"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")


@dataclass(frozen=True)
class Worth:
    """What an edit adds to the value of a path (reward less price), as far as it is known.

    Attributes:
        mean: over the questions of a heat.
        error: standard error of the mean.
    """

    mean: float
    error: float

    @property
    def upper(self) -> float:
        """What it may be worth: one standard error above the mean."""
        return self.mean + self.error

    @property
    def lower(self) -> float:
        """What it is worth with some confidence: one standard error below the mean."""
        return self.mean - self.error


@dataclass
class _Group:
    """A group in growth: its questions in the order in which heats take them, and what it knows of its edits."""

    members: list[int]
    path: Path
    edits: list[Edit]
    chain: list[Path] = field(default_factory=list)
    finalists: dict[Path, float] = field(default_factory=dict)  # mean reward of all members
    worth: dict[Edit, Worth] = field(default_factory=dict)
    is_complete: bool = False

    def options(self) -> dict[Edit, Path]:
        """The paths one edit away that the search's constraints allow."""
        paths = {(block, action): (*self.path[:block], action, *self.path[block + 1 :]) for block, action in self.edits}
        return {
            edit: path
            for edit, path in paths.items()
            if self.path[edit[0]] == EXECUTE and sum(path) and is_allowed(path)
        }


def groups_by_set(prompts: Sequence[LikelihoodPrompt], collections: Mapping[str, str] | None = None) -> torch.Tensor:
    """int64 [N]: one group per question set, or per collection of sets.

    Args:
        prompts: N questions.
        collections: the name of each set's collection, such as "arc" for "arc_easy"; a set that is missing is a group
            of its own.
    """
    names = [(collections or {}).get(prompt.question.set, prompt.question.set) for prompt in prompts]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])


def groups_by_states(rewards: LikelihoodRewards, count: int, seed: int = 0) -> torch.Tensor:
    """int64 [N]: at most `count` groups of questions that look alike to the routers on the default path."""
    default = [default_path(rewards.routed.config.num_hidden_layers)] * len(rewards.prompts)
    read = rewards.windows(default)
    return from_main(rewards.state, lambda: groups_of(standardised_states(*read), count, seed))


class LikelihoodPaths:
    """One path per group of multiple-choice questions.

    Args:
        rewards: of N questions, training and validation.
        groups: int64 [N], the group of each question, 0, 1, ...
        growth: how paths are found.
        validation: bool [N], questions that choose among the paths of a chain; default: none, the training questions
            choose.
        given: for each group the paths to choose among, beside the default path. No path is grown then, and all
            questions choose, because none of them found the paths.

    Attributes:
        chains: for each group its paths of 0, 1, ... edits and the nominees, with the mean reward of the questions
            that choose.
    """

    def __init__(
        self,
        rewards: LikelihoodRewards,
        groups: torch.Tensor,
        growth: Growth,
        validation: torch.Tensor | None = None,
        given: Sequence[Sequence[Path]] | None = None,
    ) -> None:
        self.rewards = rewards
        self.groups = groups
        self.growth = growth
        self.validation = torch.zeros(len(groups), dtype=torch.bool) if validation is None else validation
        if given is None:
            self.chains = self._measured(self._nominated(), self.validation)
        else:
            default = default_path(rewards.routed.config.num_hidden_layers)
            chains = [list(dict.fromkeys([default, *paths])) for paths in given]
            self.chains = self._measured(chains, torch.ones(len(groups), dtype=torch.bool))

    def labels(self, price: float | None = None) -> list[Path]:
        """One path per question: its group's path that is worth most at `price` (default: that of the growth)."""
        price = self.growth.price if price is None else price
        best = [max(chain, key=lambda member: member.reward - price * sum(member.path)).path for chain in self.chains]
        return [best[group] for group in self.groups.tolist()]

    def price_within(self, most_layers: float) -> float:
        """The lowest price, from that of the growth on, whose labels take at most `most_layers` blocks on average.

        Raises:
            UserError: no path of any group is short enough.
        """
        prices = {self.growth.price}
        for chain in self.chains:
            for long, short in permutations(chain, 2):
                if sum(long.path) > sum(short.path):
                    even = (long.reward - short.reward) / (sum(long.path) - sum(short.path))
                    prices.add(max(self.growth.price, even + PRICE_STEP))
        for price in sorted(prices):
            shortest = statistics.mean(sum(path) for path in self.labels(price))
            if shortest <= most_layers:
                return price
        raise UserError(
            f"the shortest paths that were found take {shortest:.2f} blocks on average, and --most_layers is "
            f"{most_layers:g}; raise it, or grow paths at a higher --price"
        )

    def report(self) -> list[dict]:
        """For each group the questions per set and the chain: edits, layers, mean reward."""
        groups = self.groups.tolist()
        return [
            {
                "questions": Counter(
                    prompt.question.set
                    for prompt, of_prompt in zip(self.rewards.prompts, groups, strict=True)
                    if of_prompt == number
                ),
                "chain": [
                    {"edits": describe_edits(member.path), "layers": sum(member.path), "reward": member.reward}
                    for member in chain
                ],
            }
            for number, chain in enumerate(self.chains)
        ]

    def train_routers(
        self,
        labels: Sequence[Path],
        seed: int,
        keep: float | None = None,
        domain: float | None = None,
        epochs: int = 25,
    ) -> None:
        """Trains routers on `labels` from the initial weights of `seed`, and leaves them in the model.

        The main process trains; the others receive the routers.

        Args:
            keep: the share of validation questions that must follow the edits of their labels. The model's knob is then
                set so that the routers abstain where they are less sure, and validation questions train no router.
            domain: the share of validation questions that must lie inside the domains of the routers, which must have
                domains. None: their domains hold every prompt.
        """
        model = self.rewards.routed.model
        model.init_routers(seed)
        routers = StackedRouters(model.routers).cpu()
        read = self.rewards.windows(labels)

        def weights() -> tuple[dict[str, torch.Tensor], float]:
            along = RewardRound(list(labels), torch.empty(0), *read)
            parts = [(~self.validation).nonzero()[:, 0], self.validation.nonzero()[:, 0]]
            imitate(routers, along, epochs, 1e-3, seed, members=None if keep is None and domain is None else parts[0])
            routers.copy_to(model.routers)
            if domain is not None:
                fit_domains(model.routers, along, *parts, domain)
            knob = PURE_ROUTER if keep is None else knob_that_keeps(routers, along, parts[1], keep)
            return {name: tensor.cpu() for name, tensor in model.routers.state_dict().items()}, knob

        state_dict, model.routing_control = from_main(self.rewards.state, weights)
        model.routers.load_state_dict(state_dict)

    def _nominated(self) -> list[list[Path]]:
        """For each group the paths to choose among."""
        growth = self.growth
        further = growth.further_prices if self.validation.any() else ()  # without validation nobody chooses from them
        grown = [self._grow(replace(growth, price=price)) for price in (growth.price, *further)]
        nominated = []
        for number, of_prices in enumerate(zip(*grown, strict=True)):
            chain = of_prices[0].chain
            finalists = {path: reward for group in of_prices for path, reward in group.finalists.items()}
            others = sorted(
                finalists.keys() - set(chain), key=lambda path: (growth.price * sum(path) - finalists[path], path)
            )
            validates = bool((self.validation & (self.groups == number)).any())
            nominated.append([*chain, *others[: growth.nominees if validates else 0]])
        return nominated

    def _grow(self, growth: Growth) -> list[_Group]:
        """The groups with their chains of paths of 0, 1, ... edits."""
        num_blocks = self.rewards.routed.config.num_hidden_layers
        every_edit = [(block, action) for action in (SKIP, REPEAT) for block in range(num_blocks)]
        training = [index for index in self._sets_in_turn() if not self.validation[index]]
        groups = [
            _Group([i for i in training if self.groups[i] == number], default_path(num_blocks), list(every_edit))
            for number in range(int(self.groups.max()) + 1)
        ]
        for group in groups:
            group.chain.append(group.path)
        for step in range(growth.max_edits):
            growing = [group for group in groups if group.members and not group.is_complete]
            if not growing:
                break
            self._run_heats(growing, step, growth)
            for group in growing:
                self._adopt(group, growth)
        return groups

    def _sets_in_turn(self) -> list[int]:
        """All questions, the sets mixed in proportion to their sizes, so that a heat has some of each."""
        sets = [prompt.question.set for prompt in self.rewards.prompts]
        sizes, seen, places = Counter(sets), Counter(), []
        for name in sets:
            seen[name] += 1
            places.append(seen[name] / sizes[name])
        return sorted(range(len(sets)), key=places.__getitem__)

    def _run_heats(self, groups: list[_Group], step: int, growth: Growth) -> None:
        """Measures the edits of one step; afterwards `edits` of each group are its finalists.

        Every heat costs a group about as many scores as the first one of the first step, which has all edits: the fewer
        edits are left, the more questions they are tried on, since it takes more to tell the better half.
        """
        largest = max(len(group.members) for group in groups)
        scores = growth.pilot * 2 * self.rewards.routed.config.num_hidden_layers
        heat = 1
        while True:
            most_edits = max(len(group.edits) for group in groups)
            is_last = most_edits <= growth.finalists
            size = largest if is_last else min(largest, -(-scores // most_edits))
            title = f"price {growth.price:g}, edit {step + 1}, heat {heat}: {size} questions per group"
            self._measure(groups, size, growth.price, title)
            if size == largest:
                return
            for group in groups:
                first = step == 0 and heat == 1
                survivors = growth.keep if first else max(growth.finalists, -(-len(group.edits) // 2))
                ranked = sorted(group.options(), key=lambda edit: group.worth[edit].upper, reverse=True)
                group.edits = ranked[: min(survivors, most_edits - 1)]
            heat += 1

    def _measure(self, groups: list[_Group], size: int, price: float, title: str) -> None:
        work: list[list[Path]] = [[] for _ in self.rewards.prompts]
        for group in groups:
            for index in group.members[:size]:
                work[index] = [group.path, *group.options().values()]
        self.rewards.score(work, title)
        for group in groups:
            members = group.members[:size]
            for edit, path in group.options().items():
                rewards, before = self._rewards(members, path), self._rewards(members, group.path)
                gains = [reward - own for reward, own in zip(rewards, before, strict=True)]
                error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
                cost = price * (sum(path) - sum(group.path))
                group.worth[edit] = Worth(statistics.mean(gains) - cost, error)
                if len(members) == len(group.members):
                    group.finalists[path] = statistics.mean(rewards)

    def _rewards(self, members: Sequence[int], path: Path) -> list[float]:
        return [self.rewards.reward(self.rewards.prompts[index], path) for index in members]

    def _adopt(self, group: _Group, growth: Growth) -> None:
        """Adds the best finalist to the group's path if it is worth it; the next step tries the best of all edits."""
        options = group.options()
        best = max(options, key=lambda edit: group.worth[edit].mean, default=None)
        if best is None or group.worth[best].mean <= growth.caution * group.worth[best].error:
            group.is_complete = True
            return
        group.path = options[best]
        group.chain.append(group.path)
        # Not by `upper`: the luckiest of the many edits that were dropped on few questions would come first.
        others = (edit for edit in group.worth if edit[0] != best[0])
        group.edits = sorted(others, key=lambda edit: group.worth[edit].lower, reverse=True)[: growth.candidates]

    def _measured(self, chains: list[list[Path]], choose: torch.Tensor) -> list[list[GroupPath]]:
        """The chains with the mean reward of each group's questions in `choose`, or else of all its questions."""
        groups = self.groups.tolist()
        choosing = [
            [i for i in range(len(groups)) if groups[i] == number and choose[i]]
            or [i for i in range(len(groups)) if groups[i] == number]
            for number in range(len(chains))
        ]
        work: list[list[Path]] = [[] for _ in groups]
        for chain, members in zip(chains, choosing, strict=True):
            for index in members:
                work[index] = chain
        self.rewards.score(work, "paths of the groups")
        return [
            [GroupPath(path, statistics.mean(self._rewards(members, path))) for path in chain]
            for chain, members in zip(chains, choosing, strict=True)
        ]
