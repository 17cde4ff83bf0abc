"""Paths as people write them: the edits of the default path, e.g. "skip 19, repeat 27"."""

from __future__ import annotations

import re

from train_models.paths import EXECUTE, REPEAT, SKIP, Path, default_path


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
