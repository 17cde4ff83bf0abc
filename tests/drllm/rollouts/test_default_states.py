"""The stored states of default paths: one tensor for all questions, whose tokens make room for one another."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from drllm.rollouts.default_states import DefaultStates, first_edit
from train_models.cache import PathCache

BLOCKS, HEADS, HEAD_DIM, WIDTH = 3, 2, 4, 6


def batch(lengths: list[int], seed: int):
    """(mask, block inputs, cache) of a left-padded batch with random states; padding holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()

    def states(*shape: int) -> torch.Tensor:
        made = torch.randn(len(lengths), width, *shape, generator=generator)
        made[mask == 0] = float("nan")
        return made

    cache = PathCache()
    cache.layers = [type("Layer", (), {})() for _ in range(2 * BLOCKS)]
    for layer in cache.layers[:BLOCKS]:
        layer.keys, layer.values = (states(HEADS, HEAD_DIM).transpose(1, 2) for _ in range(2))
    return mask, [states(WIDTH) for _ in range(BLOCKS + 1)], cache


def fetched(stored: DefaultStates, names: list[str], width: int, start: int) -> torch.Tensor:
    embeddings = torch.zeros(len(names), width, WIDTH)
    places = stored.begin(embeddings, names, [start] * len(names))
    assert places.shape == (len(names), width)
    return embeddings


def test_states_come_back_at_any_width_and_order_and_forgotten_ones_make_room():
    stored = DefaultStates()
    first = batch([5, 3, 4], 0)
    stored.keep(["a", "b", "c"], *first)
    found = fetched(stored, ["c", "a"], 7, 2)
    assert torch.equal(found[0, -4:], first[1][2][2, -4:])
    assert torch.equal(found[1, -5:], first[1][2][0, -5:])
    assert found.isfinite().all(), "what masked positions hold is a number"
    assert stored._stored[0].shape[1] == 12
    stored.forget("a")
    second = batch([2, 3], 1)
    stored.keep(["d", "e"], *second)
    assert stored._stored[0].shape[1] == 12, "the five tokens of a"
    assert torch.equal(fetched(stored, ["e", "c"], 4, 1)[:, -3:], torch.stack([second[1][1][1], first[1][1][2, -3:]]))
    stored.keep(["f", "f"], *batch([6, 6], 2))  # asked for twice in a batch: kept once
    assert stored._stored[0].shape[1] == 18
    assert stored.starts(["f", "a", "f"], [(1, 0, 1)] * 2 + [(1, 1, 1)]) == [1, 0, 0]
    assert stored.clear()
    assert not stored.places
    assert not stored.clear()


class Operations(TorchDispatchMode):
    """Counts what torch runs."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += 1
        return function(*arguments, **(options or {}))


def test_storing_and_fetching_take_operations_per_block_and_not_per_row():
    counts = []
    for rows in (4, 12):
        stored, names = DefaultStates(), [f"q{row}" for row in range(rows)]
        mask, hidden, cache = batch([3 + row % 3 for row in range(rows)], 0)
        paths = [((1, 0, 1), (1, 1, 2), (2, 1, 1), (1, 1, 0))[row % 4] for row in range(rows)]
        computed = PathCache(LlamaConfig(num_hidden_layers=BLOCKS))
        for block in range(BLOCKS):
            here = [row for row, path in enumerate(paths) if first_edit(path) <= block and path[block]]
            if here:
                layer = cache.layers[block]
                computed.layers[block].update(layer.keys[here], layer.values[here])
        with Operations() as operations:
            stored.keep(names, mask, hidden, cache)
            starts = stored.starts(names, paths)
            places = stored.begin(torch.zeros(rows, mask.shape[1], WIDTH), names, starts)
            stored.complete(computed, paths, starts, places)
        counts.append(operations.count)
        for block in range(BLOCKS):
            for place, row in enumerate(row for row, path in enumerate(paths) if path[block]):
                real = mask[row] == 1
                for name in ("keys", "values"):
                    found, expected = (getattr(layers[block], name) for layers in (computed.layers, cache.layers))
                    assert torch.equal(found[place][:, real], expected[row][:, real])
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("path", "block"), [((1, 1, 2), 2), ((0, 1, 1), 0), ((1, 1, 1), 0)])
def test_the_first_edit(path, block):
    assert first_edit(path) == block
