"""Which path each pre-training question follows: random edits (the miniature) or known paths (the positive control)."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drllm.errors import UserError
from drllm.files import read_json
from miniature.questions import KINDS, Question

# Share of blocks that pre-training skips and repeats, per set: the easier the questions, the more blocks they have to
# do without; the harder, the more often blocks run twice. The README calls this planted redundancy.
DEPTH: dict[str, tuple[float, float]] = {
    "arc_easy": (0.30, 0.02), "dart-1": (0.30, 0.02), "dart-2": (0.15, 0.05),
    "arc_challenge": (0.08, 0.08), "dart-3": (0.04, 0.10), "dart-4": (0.0, 0.15), "dart-5": (0.0, 0.15),
}  # fmt: skip


def random_path(rng: random.Random, blocks: int, skip: float, repeat: float) -> list[int]:
    """A path of independent edits with at most two consecutive skips (the constraint of the search)."""
    path: list[int] = []
    for _ in range(blocks):
        draw_ = rng.random()
        action = 0 if draw_ < skip else 2 if draw_ < skip + repeat else 1
        if action == 0 and path[-2:] == [0, 0]:
            action = 1
        path.append(action)
    return path


@dataclass(frozen=True)
class RandomEdits:
    """The default path for a share of the questions, else a random path at the rates of the question's set.

    The rates grow from zero to their final value between 30% and 60% of the training: with blocks missing from the
    first step on, learning is much slower.

    Attributes:
        blocks: L.
        default_share: share of questions that follow the default path.
        skip_rate: overrides the skip rates of `DEPTH`.
        repeat_rate: overrides the repeat rates of `DEPTH`.
    """

    blocks: int
    default_share: float = 0.3
    skip_rate: float | None = None
    repeat_rate: float | None = None

    def path(self, rng: random.Random, question: Question, progress: float) -> list[int]:
        """The path of one question at `progress` in [0, 1) of the training."""
        if rng.random() < self.default_share:
            return [1] * self.blocks
        grown = min(1.0, max(0.0, (progress - 0.30) / 0.30))
        skip, repeat = DEPTH[question.set]
        skip = skip if self.skip_rate is None else self.skip_rate
        repeat = repeat if self.repeat_rate is None else self.repeat_rate
        return random_path(rng, self.blocks, grown * skip, grown * repeat)

    def identity(self) -> dict[str, Any]:
        """What decides the paths of a run, as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class KnownPaths:
    """The default path for a share of the questions, else the known path of the question's kind.

    Attributes:
        paths: kind -> path in {0,1,2}^L.
        default_share: share of questions that follow the default path.
    """

    paths: dict[str, tuple[int, ...]]
    default_share: float

    def path(self, rng: random.Random, question: Question, progress: float) -> list[int]:
        """The path of one question; the same for every `progress`."""
        known = self.paths[question.kind]
        return [1] * len(known) if rng.random() < self.default_share else list(known)

    def identity(self) -> dict[str, Any]:
        """What decides the paths of a run, as plain values."""
        return {"default_share": self.default_share, "paths": {kind: list(p) for kind, p in self.paths.items()}}


def read_known_paths(file: Path) -> dict[str, tuple[int, ...]]:
    """The known path of each kind from a JSON object, kind -> digits of the path, e.g. {"sum": "1101111211"}.

    Raises:
        UserError: the file is missing or not a JSON object, a kind is missing or unknown, or the paths are not digits
            0, 1, 2 of one length.
    """
    kinds = {kind for of_set in KINDS.values() for kind in of_set}
    written = read_json(file, "write an object, kind -> digits of the path")
    if written.keys() != kinds:
        missing, unknown = sorted(kinds - written.keys()), sorted(written.keys() - kinds)
        raise UserError(f"{file}: missing kinds {missing}, unknown kinds {unknown}")
    paths = [path if isinstance(path, str) else "?" for path in written.values()]
    if len(set(map(len, paths))) != 1 or not set("".join(paths)) <= set("012"):
        raise UserError(f"{file}: paths must be strings of the digits 0, 1 and 2, all of one length")
    return {kind: tuple(map(int, digits)) for kind, digits in written.items()}
