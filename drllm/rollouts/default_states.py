"""The default path's hidden states, keys and values of the questions being searched, from which other rollouts start.

All tokens of all questions lie in one tensor of each kind, so that a batch is stored and fetched block by block and not
row by row: on a GPU each copy costs the host more than the copying.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from train_models.cache import PathCache, RowSchedule
from train_models.paths import EXECUTE, Path

# On a GPU memory limits the rows of a batch. Keeping every fourth block's inputs costs 1.5 blocks that run again.
STRIDE_ON_GPU = 4


def first_edit(path: Path) -> int:
    """The first block that does not run exactly once; 0 for the default path, which is computed whole."""
    return next((block for block, visits in enumerate(path) if visits != EXECUTE), 0)


class DefaultStates:
    """Keys and values [L, N, ...] and block inputs [L / stride, N, d] of N tokens; a question's are at its `places`.

    Tokens of questions that are forgotten make room for others; the tensors grow as needed and do not shrink.

    Args:
        stride: rollouts may start at its multiples.
    """

    def __init__(self, stride: int = 1) -> None:
        self.stride = stride
        self.places: dict[str, list[int]] = {}  # question id -> places of its tokens
        self._free: list[int] = []
        self._stored: list[torch.Tensor] = []  # inputs, keys, values

    def clear(self) -> bool:
        """Forgets all questions and gives the memory back; returns whether there was any."""
        held = bool(self._stored)
        self.places, self._free, self._stored = {}, [], []
        return held

    def forget(self, question_id: str) -> None:
        """Makes room for other questions."""
        self._free += self.places.pop(question_id, [])

    def keep(
        self, question_ids: Sequence[str], mask: torch.Tensor, hidden_states: Sequence[torch.Tensor], cache: PathCache
    ) -> None:
        """Remembers a batch that ran the default path.

        Args:
            question_ids: question of each row.
            mask: [B, T], 1 for real tokens, which are the last ones of a row.
            hidden_states: inputs of the blocks, [B, T, d] each; only those at multiples of `stride` are read.
            cache: filled by these rows.
        """
        lengths = dict(zip(question_ids, mask.sum(1).tolist(), strict=True))
        for question_id in lengths:
            self.forget(question_id)
        layers = cache.layers[: len(hidden_states) - 1]
        self._make_room(sum(lengths.values()), hidden_states[0], layers)
        for question_id, length in lengths.items():
            self.places[question_id] = self._free[-length:]
            del self._free[-length:]
        is_real = mask.flatten().nonzero().flatten()
        ids = [place for question_id in question_ids for place in self.places[question_id]]
        where = torch.tensor(ids, device=mask.device)
        for block, layer in enumerate(layers):
            parts = [
                (stored[block], part.transpose(1, 2))
                for stored, part in zip(self._stored[1:], (layer.keys, layer.values), strict=True)
            ]
            if block % self.stride == 0:
                parts.append((self._stored[0][block // self.stride], hidden_states[block]))
            for stored, part in parts:
                stored.index_copy_(0, where, part.flatten(0, 1).index_select(0, is_real))

    def _make_room(self, tokens: int, hidden: torch.Tensor, layers: Sequence) -> None:
        if not self._stored:
            shapes = (hidden.shape[2:], *(part.shape[1::2] for part in (layers[0].keys, layers[0].values)))
            inputs = -(-len(layers) // self.stride)
            counts = (inputs, len(layers), len(layers))
            self._stored = [hidden.new_zeros(n, 0, *shape) for n, shape in zip(counts, shapes, strict=True)]
        if (missing := tokens - len(self._free)) > 0:
            size = self._stored[0].shape[1]
            for kind, old in enumerate(self._stored):  # one after the other: the old one goes before the next is made
                # Zeros: what masked positions hold must be a number.
                new = old.new_zeros(len(old), missing, *old.shape[2:])
                self._stored[kind] = torch.cat([old, new], dim=1)
            self._free += range(size, size + missing)

    def starts(self, question_ids: Sequence[str], paths: Sequence[Path]) -> list[int]:
        """The block at which each row may start."""
        pairs = zip(question_ids, paths, strict=True)
        return [
            first_edit(path) // self.stride * self.stride if question_id in self.places else 0
            for question_id, path in pairs
        ]

    def begin(self, embeddings: torch.Tensor, question_ids: Sequence[str], starts: Sequence[int]) -> torch.Tensor:
        """Writes the inputs of the blocks at `starts` into `embeddings` [B, T, d], left-padded.

        Returns:
            The places [R, T] of the tokens of the R rows that do not start at block 0.
        """
        width = embeddings.shape[1]
        rows = [row for row, start in enumerate(starts) if start]
        known = [self.places[question_ids[row]] for row in rows]
        places = torch.tensor([[0] * (width - len(one)) + one for one in known], device=embeddings.device)
        blocks = torch.tensor([[starts[row] // self.stride] for row in rows], device=embeddings.device)
        embeddings[torch.tensor(rows, device=embeddings.device)] = self._stored[0][blocks, places]
        return places

    def complete(self, cache: PathCache, paths: Sequence[Path], starts: Sequence[int], places: torch.Tensor) -> None:
        """Adds the keys and values of the blocks below `starts`, which these rows did not run, to `cache`.

        Left-padded positions hold those of other tokens; the attention mask hides them.
        """
        device = places.device
        start, visits = torch.tensor(starts), torch.tensor(paths)
        highest = int(start.max())
        is_stored = start[:, None] > torch.arange(highest)
        # Per block the stored rows, by their number in `places`, and the order that puts them among the computed ones.
        indices, number = [], is_stored[:, 0].cumsum(0) - 1
        for block in range(highest):
            stored = is_stored[:, block].nonzero().flatten()
            computed = (~is_stored[:, block] & (visits[:, block] > 0)).nonzero().flatten()
            indices += [number[stored], torch.cat([computed, stored]).argsort()]
        on_device = torch.cat(indices).to(device).split([len(index) for index in indices])
        for block in range(highest):
            layer, (stored, order) = cache.layers[block], on_device[2 * block : 2 * block + 2]
            found = [part[block][places[stored]].transpose(1, 2) for part in self._stored[1:]]
            if len(order) == len(stored):
                layer.update(*found)  # the first use of an empty layer
            else:
                for name, part in zip(("keys", "values"), found, strict=True):
                    setattr(layer, name, torch.cat([getattr(layer, name), part]).index_select(0, order))
        cache.schedule = RowSchedule.of(paths, len(paths[0]), device)
