"""A KV cache for paths: each application of a block owns its keys and values.

Slots 0..L-1 hold the first visits of the blocks, slots L..2L-1 the second ones. A slot holds only the rows of the batch
whose path makes that visit, so a skipped block costs no memory. The decided paths are kept with the cache: decoding
follows them, and no router decides twice.
"""

import inspect
from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import create_causal_mask

from .paths import EXECUTE, REPEAT, Path

# What transformers calls the cache in the arguments of blocks, masks and models, and in their outputs: since 5.24
# "cache", before "past_key_values".
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def one_cache(past_key_values, cache):
    """The cache that was passed under one of its two names, or None; ValueError for a different one under each."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument; pass one of them")
    return past_key_values if cache is None else cache


class RowSchedule:
    """Which rows of the batch run each visit of each block.

    Built block by block while routers decide (`append`), or at once for known paths. Index tensors are made once, on
    the device, and reused by each decoding step.
    """

    def __init__(self, batch_size: int, device: torch.device):
        self.batch_size = batch_size
        self.device = device
        self._visits_per_block: list[list[int]] = []  # [block][row] -> 0, 1 or 2
        self._row_sets: list[list[int]] = []  # [block][visit] -> number of the set of rows that make the visit
        self._row_set_numbers: dict[tuple[int, ...], int] = {tuple(range(batch_size)): 0}
        self._row_indices: list[torch.Tensor | None] = [None]  # of each set, by its number; None for all rows
        self._paths_tensor: torch.Tensor | None = None

    @classmethod
    def of(cls, paths: Sequence[Path], num_blocks: int, device: torch.device) -> "RowSchedule":
        """The schedule of known paths, one per row."""
        schedule = cls(len(paths), device)
        for block in range(num_blocks):
            schedule.append([path[block] for path in paths])
        return schedule

    def append(self, visits: Sequence[int]) -> None:
        """Adds the next block, `visits[row]` times in each row."""
        self._visits_per_block.append(list(visits))
        rows_by_visit = (self.rows_of(len(self._row_sets), visit) for visit in range(max(visits, default=0)))
        self._row_sets.append([self._number_of(rows) for rows in rows_by_visit])

    def rows_of(self, block: int, visit: int) -> tuple[int, ...]:
        """The rows that run `block` for the (`visit` + 1)-th time."""
        return tuple(row for row, visits in enumerate(self._visits_per_block[block]) if visits > visit)

    def __bool__(self) -> bool:
        return True  # also before the first block is decided, and for an empty batch

    def __len__(self) -> int:
        return len(self._row_sets)

    def __getitem__(self, block: int) -> list[int]:
        """One entry per visit that some row makes: the number of the set of rows that make it."""
        return self._row_sets[block]

    def first_row(self) -> tuple[int, torch.Tensor | None]:
        """(number, indices) of the set of the first row alone."""
        number = self._number_of((0,))
        return number, self._row_indices[number]

    def row_indices(self, row_set: int) -> torch.Tensor | None:
        """int64 indices of the rows in the set of that number, or None for all rows of the batch."""
        return self._row_indices[row_set]

    def paths(self) -> list[Path]:
        """The path of each row, as far as it is decided."""
        return [tuple(visits[row] for visits in self._visits_per_block) for row in range(self.batch_size)]

    def paths_tensor(self) -> torch.Tensor:
        """The decided paths, int8 [batch, L] on the device of the rows; made once, each decoding step reports them."""
        if self._paths_tensor is None or self._paths_tensor.shape[1] != len(self):
            by_block = torch.tensor(self._visits_per_block, dtype=torch.int8, device=self.device)
            self._paths_tensor = by_block.view(len(self), self.batch_size).T.contiguous()
        return self._paths_tensor

    def _number_of(self, rows: tuple[int, ...]) -> int:
        # Numbers in the order of appearance, so that equal paths give equal numbers: compiled code keeps them as
        # constants, and would be compiled again for other ones.
        if rows not in self._row_set_numbers:
            self._row_set_numbers[rows] = len(self._row_indices)
            self._row_indices.append(torch.tensor(rows, dtype=torch.int64, device=self.device))
        return self._row_set_numbers[rows]


def applications(schedule: RowSchedule | None, forward_passes: int) -> torch.Tensor:
    """int64 [batch]: block applications of each row over so many passes; RuntimeError where there is no schedule."""
    if schedule is None:
        raise RuntimeError("no forward pass has run yet, so no block applications were counted")
    return torch.tensor([sum(path) * forward_passes for path in schedule.paths()])


class _Slot:
    """Stands in for the cache while one visit of one block runs, and sends its keys and values to the right slot."""

    def __init__(self, layer: CacheLayerMixin):
        self._layer = layer

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_args, **kwargs):
        return self._layer.update(key_states, value_states, **kwargs)


class PathCache(DynamicCache):
    """A `DynamicCache` of 2L slots that remembers the path of each row.

    All of generation's operations on caches (beam reordering, cropping, selecting and repeating rows) keep keys, values
    and paths together. An empty stock `DynamicCache` is turned into a `PathCache` in place by `of`, so that the object
    that the caller holds is right after the call.
    """

    holder = None  # the graphs whose buffers hold entries that the slots lack

    def __init__(self, config: PreTrainedConfig | None = None, max_cache_len: int | None = None):
        """
        Args:
            config: the model's configuration; None leaves making the slots to the first forward pass.
            max_cache_len: tokens to allocate a slot for at its first use, for compiled blocks; None grows as needed.
        """
        super().__init__()
        self._start(config, max_cache_len)

    def _start(self, config: PreTrainedConfig | None, max_cache_len: int | None) -> None:
        self.holder = None
        self.schedule: RowSchedule | None = None
        self.tokens_seen = 0
        self.forward_passes = 0
        self._records_past = False
        self._config = config
        self._max_cache_len = max_cache_len
        if config is not None:
            self._make_slots()

    def _make_slots(self) -> None:
        recording = self._records_past or any(getattr(layer, "record_past", False) for layer in self.layers)
        self.layers = []
        for _visit in (EXECUTE, REPEAT):
            if self._max_cache_len is None:
                self.layers += DynamicCache(config=self._config).layers
            else:
                self.layers += StaticCache(config=self._config, max_cache_len=self._max_cache_len).layers
        if recording:
            self.activate_past_recording()
        # Made once and not at each visit: in decoding a small model, Python's time counts.
        slots = [_Slot(layer) for layer in self.layers]
        self._slots = list(zip(slots[: len(slots) // 2], slots[len(slots) // 2 :], strict=True))

    @property
    def layers(self) -> list[CacheLayerMixin]:
        """The slots, with all entries: first visits, then second ones."""
        self.settle()
        return self._slot_layers

    @layers.setter
    def layers(self, layers: list[CacheLayerMixin]) -> None:
        self._slot_layers = layers

    def settle(self) -> None:
        """Takes back the newest entries from the buffers of CUDA graphs (`graphs.py`), where these hold them."""
        if self.holder is not None:
            self.holder.release()

    def __getstate__(self) -> dict:
        self.settle()
        return self.__dict__

    def activate_past_recording(self) -> None:
        """Also before the first forward pass makes the slots."""
        self._records_past = True
        super().activate_past_recording()

    @classmethod
    def of(cls, cache, config: PreTrainedConfig) -> "PathCache":
        """`cache` itself, ready for a model of `config`; None gives a new one.

        Raises ValueError for a cache that already holds keys of another model run, and for kinds of caches (quantised,
        offloaded) that cannot hold two visits of a block.
        """
        if cache is None:
            return cls(config)
        if isinstance(cache, PathCache):
            if cache._config is None:
                cache._config = config
                cache._make_slots()
            return cache
        if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
            kind = "an offloaded cache" if getattr(cache, "offloading", False) else f"a {type(cache).__name__}"
            raise ValueError(
                f"past_key_values is {kind}, which has no room for the second visit of a repeated block; omit "
                "past_key_values and cache_implementation, or pass a DynamicCache(), StaticCache() or PathCache()"
            )
        if cache.get_seq_length() > 0:
            raise ValueError(
                "past_key_values already holds tokens, but no path was decided for them; pass an empty cache and the "
                "whole prompt"
            )
        max_cache_len = cache.layers[0].max_cache_len if type(cache) is StaticCache else None
        layers = cache.__dict__.pop("layers")
        cache.__class__ = cls
        cache.layers = layers
        cache._start(config, max_cache_len)
        return cache

    @property
    def paths(self) -> list[Path] | None:
        """The path of each row, or None before the first forward pass."""
        return None if self.schedule is None else self.schedule.paths()

    @property
    def block_applications(self) -> torch.Tensor:
        """int64 [batch]: block applications of each row, summed over the forward passes with this cache.

        Raises RuntimeError before the first one.
        """
        return applications(self.schedule, self.forward_passes)

    def slot(self, block: int, visit: int) -> _Slot:
        """What the attention of `block` gets as its cache on its (`visit` + 1)-th visit."""
        self.settle()
        return self._slots[block][visit]

    def advance(self, schedule: RowSchedule, num_tokens: int) -> None:
        """Notes that a forward pass over `num_tokens` new tokens per row has ended."""
        self.schedule = schedule
        self.tokens_seen += num_tokens
        self.forward_passes += 1

    # The stock cache takes its length from the first layer, which here may be skipped by some rows or by all.

    @property
    def is_compileable(self) -> bool:
        """Whether masks are made for slots of a fixed length; not while graphs, which make their own, hold them."""
        return self._max_cache_len is not None and self.holder is None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, whichever blocks they ran through."""
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key length, key offset) of the masks for the kind of layer (full or sliding) at `layer_idx`."""
        kind = self.layers[layer_idx].is_sliding
        in_use = (slot for slot in self.layers if slot.is_sliding == kind and slot.is_initialized)
        if (slot := next(in_use, None)) is not None:
            return slot.get_mask_sizes(query_length)
        if self._max_cache_len is not None:
            return self.layers[layer_idx].get_mask_sizes(query_length)
        return self.tokens_seen + query_length, 0

    def reset(self) -> None:
        """Empties the cache; the next forward pass is a prefill and decides again."""
        self._start(self._config, self._max_cache_len)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -`tokens_to_remove` tokens (a negative number, as in transformers) from every row.

        A positive number is the number of tokens to keep, as it is for transformers before 5.14.
        """
        if tokens_to_remove > 0:
            tokens_to_remove = min(tokens_to_remove - self.tokens_seen, 0)
        if tokens_to_remove == 0 and not self._records_past:
            return  # before 5.14, 0 would be the number of tokens to keep
        for layer in self.layers:
            if layer.is_initialized:
                layer.crop(tokens_to_remove)
        self.tokens_seen += tokens_to_remove

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` [new batch], in that order, with their paths; rows may repeat."""
        if self.schedule is None:
            return
        selected = indices.nonzero().flatten().tolist() if indices.dtype == torch.bool else indices.tolist()
        old, paths = self.schedule, self.schedule.paths()
        for block in range(len(old)):
            for visit in range(len(old[block])):
                # A slot is compact: it holds only the rows of this visit, in the order of the batch.
                position = {row: index for index, row in enumerate(old.rows_of(block, visit))}
                chosen = [position[row] for row in selected if row in position]
                slot = self.layers[block + visit * self._config.num_hidden_layers]
                if not chosen:
                    slot.keys = slot.values = None
                    slot.is_initialized = False
                elif chosen != list(range(len(position))):
                    slot.reorder_cache(torch.tensor(chosen, device=slot.keys.device))
        self.schedule = RowSchedule.of([paths[row] for row in selected], len(old), old.device)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in the order of the surviving beams."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times, consecutively."""
        if self.schedule is not None:
            self.batch_select_indices(torch.arange(self.schedule.batch_size).repeat_interleave(repeats))
