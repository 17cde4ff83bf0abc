"""Length-aware Monte Carlo tree search over paths (DrLLM, section 3.2). Knows no torch and no model.

A search is a tree over vectors y in {0, 1, 2}^L. A node is a path, the root is the default path, an action is one
edit of a block that still runs once: skip it or repeat it. A search does not call a model; it asks:

    search = PathSearch(num_blocks, settings, question_seed(seed, question_id))
    while search.request is not None:         # the path whose reward is wanted
        search.tell(reward_of(search.request))
    search.result()

Hundreds of searches can so share the batches of one model, and the result of each depends on its own seed and rewards
alone, whatever runs beside it.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Generator
from dataclasses import dataclass, field

from train_models.paths import DEFAULT_BUDGET, EXECUTE, REPEAT, SKIP, Path, default_path, is_allowed

EDITS = (SKIP, REPEAT)  # of a block that runs once

POLICIES = ("chain", "full", "widening", "guided", "greedy")
DEFAULT_POLICY = "widening"


@dataclass(frozen=True)
class SearchSettings:
    """What a search does; the defaults are the paper's where it names a value.

    Attributes:
        num_simulations: walks through the tree a question. The default path's own reward is not counted among them.
        budget: the longest path, in multiples of the number of blocks; at least 1, where the default path lies.
        exploration: c of Equation (UCB).
        length_penalty: lambda of the same equation.
        random_child: probability of a uniformly random child instead of the best one.
        policy: which node grows a child, see `PathSearch`.
    """

    num_simulations: int = 50
    budget: float = DEFAULT_BUDGET
    exploration: float = 1.8
    length_penalty: float = 3.0
    random_child: float = 0.1
    policy: str = DEFAULT_POLICY

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"unknown policy {self.policy!r}: choose one of {', '.join(POLICIES)}")
        if self.num_simulations < 0:
            raise ValueError(f"num_simulations is {self.num_simulations}; it must not be negative")
        if self.budget < 1:
            raise ValueError(f"budget is {self.budget:g}; it must be at least 1, where the default path lies")
        if not 0 <= self.random_child <= 1:
            raise ValueError(f"the probability of a random child is {self.random_child:g}, not within 0 and 1")


@dataclass(frozen=True)
class SearchResult:
    """What one search found.

    Attributes:
        base_correct: whether the default path is right.
        best_path: for a wrong answer the first path found that makes it right, else None; for a right answer the
            shortest right path found (the default path when there is no shorter one).
        good_paths: all right paths found other than the default one, shortest first.
        simulations: walks through the tree; a walk that ends at a path seen before counts, so that a search ends.
        inferences: rewards asked for, the default path's among them.
    """

    base_correct: bool
    best_path: Path | None
    good_paths: tuple[Path, ...]
    simulations: int
    inferences: int

    @property
    def kind(self) -> str | None:
        """ "wrong_to_right", "shorter", or None when the best path teaches nothing."""
        if self.best_path is None:
            return None
        if not self.base_correct:
            return "wrong_to_right"
        return "shorter" if sum(self.best_path) < len(self.best_path) else None


def question_seed(seed: int, question_id: str) -> int:
    """The seed of one question's search: a stable hash, so that it depends on no order of work."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{question_id}".encode()).digest()[:8], "big")


@dataclass(eq=False, slots=True)
class Node:
    """A path in the tree. `total_reward` is Q, without the length penalty; `visits` is v."""

    path: Path
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    untried: list[tuple[int, int]] | None = None  # edits (block, visits) in random order; None until the first walk
    visits: int = 0
    total_reward: float = 0.0


class PathSearch:
    """One question's search, driven from outside through `request` and `tell`.

    A walk descends from the root by UCB = Q/v + c sqrt(ln V / v) - lambda |path| / L, with V the parent's visits, until
    a node grows a new child, whose reward is then asked for and added to Q on the way up. The tree holds each path
    once: an edit that leads to a path already in the tree is no child. Which nodes grow is the policy:

    * "chain": only nodes without children, as published. Each walk then lengthens one line, and UCB decides nothing.
    * "full": a node grows all its children before any walk passes it. With 2L actions most walks end at depth one.
    * "widening": a node with v visits may have up to sqrt(2 v) children, so that the tree has breadth and depth.
    * "guided": as widening, but the next edit is not a random one: edits are ranked by the mean reward of all paths
      of this question that contain them, and a right answer's skips come before its repeats.
    * "greedy": as guided for a wrong answer. For a right one no tree policy: the shortest right path found so far that
      has an untried skip grows by the most promising one.

    A wrong answer's search ends with the first right path. A right one's uses all simulations to shorten the path.
    """

    def __init__(self, num_blocks: int, settings: SearchSettings, seed: int) -> None:
        self.settings = settings
        self.root = Node(default_path(num_blocks))
        self.rewards: dict[Path, float] = {}  # every evaluated path, in the order of evaluation
        self.simulations = 0
        self._random = random.Random(seed)
        self._right_nodes: list[Node] = []
        self._edit_rewards: dict[tuple[int, int], list[float]] = {}  # (block, visits) -> [paths with it, their reward]
        self._steps = self._run()
        self.request: Path | None = next(self._steps)

    def tell(self, reward: float) -> None:
        """The reward of `request`, within [0, 1], where 1 is a right answer; moves on to the next request."""
        if self.request is None:
            raise RuntimeError("the search is over and asked for no reward")
        if not 0 <= reward <= 1:
            raise ValueError(f"the reward is {reward}, not within 0 and 1")
        self.rewards[self.request] = reward
        try:
            self.request = self._steps.send(reward)
        except StopIteration:
            self.request = None

    @property
    def base_correct(self) -> bool | None:
        """Whether the default path is right; None before its reward is known."""
        reward = self.rewards.get(self.root.path)
        return None if reward is None else _is_right(reward)

    def result(self) -> SearchResult:
        """What is known so far; final once `request` is None. RuntimeError before the first reward."""
        if self.base_correct is None:
            raise RuntimeError("the search has no result before the default path's reward is known")
        right = [path for path, reward in self.rewards.items() if _is_right(reward)]
        right.sort(key=lambda path: (sum(path), _number_of_edits(path)))  # stable: then in the order of finding
        return SearchResult(
            base_correct=self.base_correct,
            # Among equally short ones the closest to the default, which itself stays when none is shorter.
            best_path=right[0] if right else None,
            good_paths=tuple(path for path in right if path != self.root.path),
            simulations=self.simulations,
            inferences=len(self.rewards),
        )

    def _run(self) -> Generator[Path, float, None]:
        self._learn(self.root, (yield self.root.path))
        while self.simulations < self.settings.num_simulations:
            leaf = self._descend()
            reward = self.rewards.get(leaf.path)
            if reward is None:
                reward = yield leaf.path
            self._learn(leaf, reward)
            self.simulations += 1
            if not self.base_correct and _is_right(reward):
                return

    def _descend(self) -> Node:
        """The walk: from the root to a new child, or to a node that has none and can have none."""
        if self.settings.policy == "greedy" and self.base_correct:
            for node in sorted(self._right_nodes, key=lambda node: sum(node.path)):
                if (child := self._grow(node)) is not None:
                    return child
        node = self.root
        while True:
            if self._may_grow(node) and (child := self._grow(node)) is not None:
                return child
            if not node.children:
                return node
            node = self._select(node)

    def _may_grow(self, node: Node) -> bool:
        match self.settings.policy:
            case "chain":
                return not node.children
            case "full":
                return True
            case _:
                return len(node.children) < math.sqrt(2 * node.visits)

    def _grow(self, node: Node) -> Node | None:
        """Adds a child of `node` whose path is allowed and new to the tree; None when there is none left."""
        if node.untried is None:
            unedited = [block for block, visits in enumerate(node.path) if visits == EXECUTE]
            edits = (SKIP,) if self.settings.policy == "greedy" and self.base_correct else EDITS
            node.untried = [(block, visits) for block in unedited for visits in edits]
            self._random.shuffle(node.untried)
        while node.untried:
            if self.settings.policy in ("guided", "greedy"):
                node.untried.sort(key=self._promise)  # stable: equal ones stay in random order
            block, visits = node.untried.pop()
            path = (*node.path[:block], visits, *node.path[block + 1 :])
            # The constraints are those of the whole path, so that edits cannot add up to what none of them may do.
            if path not in self.rewards and is_allowed(path, self.settings.budget):
                child = Node(path, node)
                node.children.append(child)
                return child
        return None

    def _promise(self, edit: tuple[int, int]) -> tuple[bool, float]:
        count, total = self._edit_rewards.get(edit, (0, 0.0))
        is_preferred = edit[1] == SKIP or not self.base_correct
        return is_preferred, (total + 1) / (count + 1)  # an edit not tried yet counts as right

    def _select(self, node: Node) -> Node:
        if self._random.random() < self.settings.random_child:
            return node.children[self._random.randrange(len(node.children))]
        return max(node.children, key=lambda child: self._ucb(child, node))

    def _ucb(self, child: Node, parent: Node) -> float:
        value = child.total_reward / child.visits
        exploration = math.sqrt(math.log(parent.visits) / child.visits)
        length = sum(child.path) / len(child.path)
        return value + self.settings.exploration * exploration - self.settings.length_penalty * length

    def _learn(self, leaf: Node, reward: float) -> None:
        if leaf.visits == 0:
            if _is_right(reward):
                self._right_nodes.append(leaf)
            for block, visits in enumerate(leaf.path):
                if visits != EXECUTE:
                    counts = self._edit_rewards.setdefault((block, visits), [0, 0.0])
                    counts[0] += 1
                    counts[1] += reward
        node: Node | None = leaf
        while node is not None:
            node.visits += 1
            node.total_reward += reward
            node = node.parent


def _is_right(reward: float) -> bool:
    return reward >= 1


def _number_of_edits(path: Path) -> int:
    return sum(visits != EXECUTE for visits in path)
