"""Length-aware Monte Carlo tree search over paths (Section 4 of the paper). Imports neither torch nor a model.

A search is a tree over vectors y in {0, 1, 2}^L. A node is a path, the root is the default path, and an action edits
one block that still runs once: skip it or repeat it. A search does not call a model; it requests rewards:

    search = PathSearch(num_blocks, settings, question_seed(seed, question_id))
    while search.request is not None:         # the next path to evaluate
        search.tell(reward_of(search.request))
    search.result()

Hundreds of searches can therefore share the batches of one model. The result of each depends only on its own seed and
rewards, regardless of what runs beside it.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Generator
from dataclasses import dataclass, field

from train_models.paths import DEFAULT_BUDGET, EXECUTE, REPEAT, SKIP, Path, default_path, is_allowed

EDITS = (SKIP, REPEAT)  # the possible edits of a block that runs once

POLICIES = ("chain", "full", "widening")
DEFAULT_POLICY = "widening"
STOPS = ("wrong_to_right", "any_gain", "never")


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search; the defaults are the paper's where it gives a value.

    Attributes:
        num_simulations: simulations (walks through the tree) per question; evaluating the default path is not one.
        budget: length limit of a path, in multiples of the number of blocks; at least 1, the default path's length.
        exploration: c of the UCB score.
        length_penalty: lambda of the UCB score.
        random_child: probability of descending to a uniformly random child instead of the best one.
        policy: which nodes may grow a child, see `PathSearch`.
        stop_at: what ends a search early. "wrong_to_right": the first right path of a wrong answer (Algorithm 1 of the
            paper); "any_gain": also the first shorter right path of a right answer (its Section 4.2); "never": nothing,
            for a reward that is the mean over several questions.

    Raises:
        ValueError: a value outside its range.
    """

    num_simulations: int = 50
    budget: float = DEFAULT_BUDGET
    exploration: float = 1.8
    length_penalty: float = 3.0
    random_child: float = 0.1
    policy: str = DEFAULT_POLICY
    stop_at: str = STOPS[0]

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"unknown policy {self.policy!r}: choose one of {', '.join(POLICIES)}")
        if self.stop_at not in STOPS:
            raise ValueError(f"unknown stop_at {self.stop_at!r}: choose one of {', '.join(STOPS)}")
        if self.num_simulations < 0:
            raise ValueError(f"num_simulations is {self.num_simulations}; it must not be negative")
        if not 1 <= self.budget < math.inf:
            raise ValueError(f"budget is {self.budget:g}; it must be at least 1, the default path's length")
        for name in ("exploration", "length_penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be a number of at least 0")
        if not 0 <= self.random_child <= 1:
            raise ValueError(f"random_child is {self.random_child:g}; a probability must be between 0 and 1")


@dataclass(frozen=True)
class SearchResult:
    """The result of one search.

    Attributes:
        base_correct: whether the default path's answer is right.
        best_path: the shortest right path found, None if there is none; of a wrong answer whose search ended there, the
            first one; of a right answer the default path when none is shorter.
        good_paths: all right paths found except the default one, shortest first.
        simulations: walks through the tree. A walk that ends at an already evaluated path counts too, so that every
            search ends.
        inferences: evaluated paths, including the default one.
    """

    base_correct: bool
    best_path: Path | None
    good_paths: tuple[Path, ...]
    simulations: int
    inferences: int

    @property
    def kind(self) -> str | None:
        """ "wrong_to_right", "shorter", or None when the best path is the default one or there is none."""
        if self.best_path is None:
            return None
        if not self.base_correct:
            return "wrong_to_right"
        return "shorter" if sum(self.best_path) < len(self.best_path) else None


def question_seed(seed: int, question_id: str) -> int:
    """The seed of one question's search: a stable hash, independent of the order of the questions."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{question_id}".encode()).digest()[:8], "big")


@dataclass(eq=False, slots=True)
class Node:
    """A path in the tree. `total_reward` is Q, without the length penalty; `visits` is v."""

    path: Path
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    untried: list[tuple[int, int]] | None = None  # edits (block, visits) in random order; None before the first growth
    visits: int = 0
    total_reward: float = 0.0


class PathSearch:
    """One question's search, driven from outside through `request` and `tell`.

    A walk descends from the root by UCB = Q/v + c sqrt(ln V / v) - lambda |path| / L, with V the parent's visits, until
    a node grows a new child, whose reward is then requested and added to Q along the walk. The tree holds each path
    once: an edit that leads to a path already in the tree creates no child. The policy decides which nodes grow:

    * "chain": only nodes without children, as in the published code. Every walk lengthens one line of nodes, so UCB
      decides nothing.
    * "full": a node grows all its children before a walk passes it. With 2L actions most walks end at depth one.
    * "widening": progressive widening; a node with v visits may have up to sqrt(2 v) children, so that the tree has
      both breadth and depth.

    For a wrong answer the search ends with the first right path. For a right answer it uses all simulations to find
    shorter right paths. `stop_at` changes both. `result` reads the rewards as right or wrong answers of one question;
    `ranked` reads them as what a path is worth, the mean reward of several questions for example.
    """

    def __init__(self, num_blocks: int, settings: SearchSettings, seed: int) -> None:
        self.settings = settings
        self.root = Node(default_path(num_blocks))
        self.rewards: dict[Path, float] = {}  # every evaluated path, in the order of evaluation
        self.simulations = 0
        self._random = random.Random(seed)
        self._steps = self._run()
        self.request: Path | None = next(self._steps)

    def tell(self, reward: float) -> None:
        """Takes the reward of `request` and moves on to the next request.

        Args:
            reward: within [0, 1]; 1 is a right answer.

        Raises:
            RuntimeError: the search has ended.
            ValueError: the reward is NaN or outside [0, 1].
        """
        if self.request is None:
            raise RuntimeError("the search has ended and requested no reward")
        if not 0 <= reward <= 1:
            raise ValueError(f"the reward is {reward}; it must be between 0 and 1")
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
        """The result so far; final once `request` is None. RuntimeError before the first reward."""
        if self.base_correct is None:
            raise RuntimeError("the search has no result before the default path's reward is known")
        right = [path for path, reward in self.rewards.items() if _is_right(reward)]
        right.sort(key=lambda path: (sum(path), _number_of_edits(path)))  # stable: ties stay in the order of evaluation
        return SearchResult(
            base_correct=self.base_correct,
            # Among equally short paths the one with fewest edits, so the default path unless there is a shorter one.
            best_path=right[0] if right else None,
            good_paths=tuple(path for path in right if path != self.root.path),
            simulations=self.simulations,
            inferences=len(self.rewards),
        )

    def ranked(self, price: float) -> list[Path]:
        """The evaluated paths but the default one, by reward less `price` per block application, best first.

        Paths of equal worth stay in the order of evaluation.
        """
        edited = [path for path in self.rewards if path != self.root.path]
        return sorted(edited, key=lambda path: price * sum(path) - self.rewards[path])

    def _run(self) -> Generator[Path, float, None]:
        self._backpropagate(self.root, (yield self.root.path))
        while self.simulations < self.settings.num_simulations:
            leaf = self._descend()
            reward = self.rewards.get(leaf.path)
            if reward is None:
                reward = yield leaf.path
            self._backpropagate(leaf, reward)
            self.simulations += 1
            if _is_right(reward) and self._is_enough(leaf.path):
                return

    def _is_enough(self, right: Path) -> bool:
        """Whether the search ends with this right path."""
        stop_at = self.settings.stop_at
        return stop_at != "never" and (not self.base_correct or (stop_at == "any_gain" and sum(right) < len(right)))

    def _descend(self) -> Node:
        """One walk: from the root to a new child, or to a node that has no children and can have none."""
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
        """Adds a child to `node` whose path is allowed and not in the tree yet; None when no such child is left."""
        if node.untried is None:
            unedited = [block for block, visits in enumerate(node.path) if visits == EXECUTE]
            node.untried = [(block, visits) for block in unedited for visits in EDITS]
            self._random.shuffle(node.untried)
        while node.untried:
            block, visits = node.untried.pop()
            path = (*node.path[:block], visits, *node.path[block + 1 :])
            # Checked on the whole path: allowed edits can add up to a path that is not allowed.
            if path not in self.rewards and is_allowed(path, self.settings.budget):
                child = Node(path, node)
                node.children.append(child)
                return child
        return None

    def _select(self, node: Node) -> Node:
        if self._random.random() < self.settings.random_child:
            return node.children[self._random.randrange(len(node.children))]
        return max(node.children, key=lambda child: self._ucb(child, node))

    def _ucb(self, child: Node, parent: Node) -> float:
        value = child.total_reward / child.visits
        exploration = math.sqrt(math.log(parent.visits) / child.visits)
        length = sum(child.path) / len(child.path)
        return value + self.settings.exploration * exploration - self.settings.length_penalty * length

    def _backpropagate(self, leaf: Node, reward: float) -> None:
        node: Node | None = leaf
        while node is not None:
            node.visits += 1
            node.total_reward += reward
            node = node.parent


def _is_right(reward: float) -> bool:
    return reward >= 1


def _number_of_edits(path: Path) -> int:
    return sum(visits != EXECUTE for visits in path)
