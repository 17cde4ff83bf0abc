"""Paths as people write them: the edits of the default path, e.g. "skip 19, repeat 27"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from drllm.errors import UserError
from train_models.paths import EXECUTE, REPEAT, SKIP, Path, default_path

EDIT = r"(skip|repeat) \d+(-\d+)?"


def describe_edits(path: Path) -> str:
    """The edits of a path, e.g. "skip 19, repeat 27"; "" for the default path."""
    edits = [
        f"{'skip' if visits == SKIP else 'repeat'} {block}" for block, visits in enumerate(path) if visits != EXECUTE
    ]
    return ", ".join(edits)


def path_of_edits(edits: str, num_blocks: int) -> Path:
    """The inverse of `describe_edits`.

    Raises:
        ValueError: `edits` has another form, names a block that does not exist, or one twice.
    """
    path = list(default_path(num_blocks))
    for action, block in parse_edits(edits):
        if block >= num_blocks:
            raise ValueError(f"the model has only {num_blocks} blocks, from 0 on; there is no block {block}")
        if path[block] != EXECUTE:
            raise ValueError(f"block {block} is edited twice; keep one of its edits")
        path[block] = action
    return tuple(path)


def parse_edits(edits: str) -> list[tuple[int, int]]:
    """The (action, block) pairs of "skip 10-13, repeat 27", which commas or semicolons separate; none of "".

    Raises:
        ValueError: `edits` has another form.
    """
    if edits and not re.fullmatch(rf"{EDIT}([,;] {EDIT})*", edits):
        raise ValueError(f'{edits!r} is not a list of edits, such as "skip 18, repeat 27" or "skip 10-13"')
    pairs = []
    for action, first, last in re.findall(r"(skip|repeat) (\d+)-?(\d*)", edits):
        pairs += [
            ({"skip": SKIP, "repeat": REPEAT}[action], block) for block in range(int(first), int(last or first) + 1)
        ]
    return pairs


def parse_paths(argument: str, text: str) -> list[str]:
    """The edits of each path of an argument such as "skip 19; skip 18, repeat 27", where semicolons separate paths.

    Raises:
        UserError: a path has another form; names `argument`.
    """
    several = [edits.strip() for edits in text.split(";") if edits.strip()]
    try:
        for edits in several:
            parse_edits(edits)
    except ValueError as error:
        raise UserError(f"{argument}: {error}") from None
    return several


def paths_of_edits(argument: str, several: Sequence[str], num_blocks: int) -> list[Path]:
    """The paths of `parse_paths` in a model of `num_blocks` blocks.

    Raises:
        UserError: see `path_of_edits`; names `argument`.
    """
    try:
        return [path_of_edits(edits, num_blocks) for edits in several]
    except ValueError as error:
        raise UserError(f"{argument}: {error}") from None
