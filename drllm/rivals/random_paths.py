"""Decisions at the routers' rates, drawn regardless of the question."""

from __future__ import annotations

import random
from collections.abc import Sequence

from train_models.paths import Path


def random_paths(paths: Sequence[Path], seed: int) -> list[Path]:
    """`paths` with the actions of each block shuffled over the questions.

    Each block keeps its rates of skip, execute and repeat exactly, and so the mean length stays the same; what is lost
    is the connection to the question, and the one between blocks.
    """
    generator = random.Random(seed)
    columns = [generator.sample(column, len(column)) for column in zip(*paths, strict=True)]
    return list(zip(*columns, strict=True))
