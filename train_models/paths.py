"""What a path means, written once for the search, the training and the inference.

A path is a vector y in {0, 1, 2}^L that says how often each of the L blocks runs (DrLLM, section 3.1). The same path
as `layer_indices` is the non-decreasing list of block indices in the order of execution: (1, 2, 0, 1) is [0, 1, 1, 3].

This file imports nothing, so that the tree search can use it without torch.
"""

from collections.abc import Sequence

SKIP, EXECUTE, REPEAT = 0, 1, 2

MAX_CONSECUTIVE_SKIPS = 2
DEFAULT_BUDGET = 2.0

Path = tuple[int, ...]


def default_path(num_blocks: int) -> Path:
    """The path of the unmodified model: every one of the `num_blocks` blocks once."""
    return (EXECUTE,) * num_blocks


def path_to_layer_indices(path: Sequence[int]) -> list[int]:
    """[0, 1, 1, 3] for (1, 2, 0, 1): the block indices in the order in which they run."""
    return [block for block, visits in enumerate(path) for _ in range(visits)]


def layer_indices_to_path(layer_indices: Sequence[int], num_blocks: int) -> Path:
    """(1, 2, 0, 1) for [0, 1, 1, 3] and four blocks.

    Raises ValueError when the list decreases, names a block that does not exist, or visits one more than twice.
    """
    visits = [0] * num_blocks
    previous = 0
    for index in layer_indices:
        if not 0 <= index < num_blocks:
            raise ValueError(f"layer_indices names block {index}, but the model has blocks 0 to {num_blocks - 1}")
        if index < previous:
            raise ValueError(
                f"layer_indices must not decrease, but block {index} follows block {previous}: {list(layer_indices)}"
            )
        visits[index] += 1
        if visits[index] > REPEAT:
            raise ValueError(f"layer_indices visits block {index} more than twice: {list(layer_indices)}")
        previous = index
    return tuple(visits)


def path_violation(path: Sequence[int], budget: float = DEFAULT_BUDGET) -> str | None:
    """The first constraint of the search space that the whole path breaks, in words, or None (section 3.2).

    The constraints hold for the path, not for one edit: values 0, 1 or 2 (at most one repeat per block), at least one
    block, at most two consecutive skips, and a length (sum of visits) of at most `budget` times the number of blocks.
    """
    skipped_in_a_row = 0
    for block, visits in enumerate(path):
        if visits not in (SKIP, EXECUTE, REPEAT):
            return f"block {block} has the value {visits}; allowed are 0 (skip), 1 (execute) and 2 (repeat)"
        skipped_in_a_row = skipped_in_a_row + 1 if visits == SKIP else 0
        if skipped_in_a_row > MAX_CONSECUTIVE_SKIPS:
            first = block - MAX_CONSECUTIVE_SKIPS
            return f"blocks {first} to {block} are all skipped; at most two consecutive blocks may be"
    length = sum(path)
    if length == 0:
        return "no block is executed"
    if length > budget * len(path):
        return f"the length {length} is over the budget of {budget:g} x {len(path)} blocks"
    return None


def is_allowed(path: Sequence[int], budget: float = DEFAULT_BUDGET) -> bool:
    """Whether `path` lies in the search space, see `path_violation`."""
    return path_violation(path, budget) is None


def check_path(path: Sequence[int], num_blocks: int, budget: float = DEFAULT_BUDGET) -> None:
    """Raises ValueError, with the reason, unless `path` is an allowed path over `num_blocks` blocks."""
    if len(path) != num_blocks:
        raise ValueError(f"the path has {len(path)} entries, but the model has {num_blocks} blocks")
    if (violation := path_violation(path, budget)) is not None:
        raise ValueError(f"the path {list(path)} is not allowed: {violation}")
