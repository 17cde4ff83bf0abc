"""How large a batch of rollouts is: rows that a user names, or what fits into the memory of a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from drllm.rollouts.default_states import STRIDE_ON_GPU

# On a CPU a batch of an LLM gains nothing beyond some rows, and what is being searched is lost when a run is killed. In
# a toy each step costs Python, whatever its rows.
ROWS_ON_CPU, TOY_ROWS, TOY_PARAMETERS = 32, 128, 5e7
# What another batch costs on a CPU, in tokens of padding: its decoding steps read all weights, which goes with the size
# of the model as a token does, and run Python, which does not.
READING_TOKENS, PYTHON_PARAMETERS = 256, 5e9
MOST_ROWS = 4096  # beyond it a card gains nothing, and the host handles each row
SHARE_OF_MEMORY = 0.8  # of what is free; the rest is for fragments, and for prompts that come together unluckily
OPEN_BATCHES = 2  # questions that are searched at once, in batches: while one is full, the others begin or end
REPEATED = 1.25  # slots of the cache per block: paths repeat few blocks
BUFFERS = 1.3  # tokens in the buffers of `step_graphs` per token of the rows, whose shapes are rounded up
Item = TypeVar("Item")


@dataclass
class BatchLimit:
    """The most of a batch; halved when memory runs out.

    Attributes:
        rows: rows.
        tokens: rows times tokens of the longest one; None: any number.
        padding: tokens of padding that are worth another batch; None: no number.
        state_bytes: memory for the hidden states of options, from which later rollouts start.
    """

    rows: int
    tokens: int | None = None
    padding: float | None = None
    state_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"batch_size is {self.rows}; it must be at least 1")

    @classmethod
    def of(cls, batch_size: BatchSize) -> BatchLimit:
        """`batch_size` itself, or so many rows."""
        return cls(batch_size) if isinstance(batch_size, int) else batch_size

    def rows_of(self, widths: Sequence[int]) -> int:
        """How many of the rows that wait make the next batch; `widths` are their tokens, the longest first."""
        most = self.rows if self.tokens is None else min(self.rows, max(1, self.tokens // widths[0]))
        batches = -(-len(widths) // most)
        count = -(-len(widths) // batches)  # batches of one size, so that the last one is not a small remainder
        while self.padding is not None and count > 1:  # few prompts are ten times as long as most
            saved = [(count - cut) * (widths[0] - widths[cut]) for cut in range(1, count)]
            if max(saved) <= self.padding:
                break
            count = saved.index(max(saved)) + 1
        return count

    def halve(self, rows: int) -> None:
        """Goes on with half after a batch of `rows` ran out of memory."""
        if self.tokens is None:
            self.rows = rows // 2
        else:
            self.rows, self.tokens = -(-self.rows // 2), self.tokens // 2
            self.padding = self.padding and self.padding / 2
        print(f"out of memory at {rows} rows per batch: continuing with {self.rows}", file=sys.stderr)


BatchSize = int | BatchLimit


def limit_on(model: PreTrainedModel, sizes: Sequence[tuple[int, int]], rows: int | None = None) -> BatchLimit:
    """What `--batch_size ROWS`, or `auto` (None), means for `model` where it lies; `sizes` as for `limit_in`."""
    if model.device.type != "cuda":
        size = model.num_parameters()
        rows = rows or (TOY_ROWS if size < TOY_PARAMETERS else ROWS_ON_CPU)
        return BatchLimit(rows, padding=READING_TOKENS + PYTHON_PARAMETERS / size)
    if rows:
        return BatchLimit(rows)
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    free = torch.cuda.mem_get_info(model.device)[0] + unused
    return limit_in(free, model.config, model.dtype.itemsize, sizes)


def limit_in(
    free_bytes: int, config: PreTrainedConfig, bytes_per_value: int, sizes: Sequence[tuple[int, int]]
) -> BatchLimit:
    """The batches that fit into `free_bytes` of memory beside the weights.

    Memory goes with tokens, so batches of long prompts have fewer rows: prompts of average length make a batch of
    `rows`, others one of as many tokens, at least that of the longest prompt.

    Args:
        free_bytes: memory that nothing uses.
        config: shape of the model.
        bytes_per_value: size of a weight.
        sizes: (tokens of prompt and response together, places whose logits are computed) of each question.
    """
    width, blocks = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    keys_and_values = 2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    # Per token: the default path's states of a question that is being searched; of a row in a batch its cache and the
    # buffers that it is decoded in, the inputs of blocks (while default paths run), what one block holds at a time, and
    # of each visit, whose rows are others, two rotary embeddings and a row of the mask.
    inputs = width / STRIDE_ON_GPU
    kept = bytes_per_value * blocks * (inputs + keys_and_values)
    one_block = 3 * config.intermediate_size + 8 * width
    cached = REPEATED * (1 + BUFFERS) * keys_and_values
    running = bytes_per_value * (blocks * (cached + inputs + 4 * head_dim) + one_block)
    tokens, places = (mean(column) for column in zip(*sizes, strict=True))
    logits = places * config.vocab_size * (bytes_per_value + 4)
    running += 2 * blocks * tokens
    usable = SHARE_OF_MEMORY * free_bytes
    rows = int(usable / (tokens * (OPEN_BATCHES * kept + running) + logits))
    rows = max(1, min(rows, MOST_ROWS))
    longest = max(size for size, _ in sizes)
    most = max(int(rows * tokens), longest)
    return BatchLimit(rows, most, most / 4, int(OPEN_BATCHES * rows * tokens * kept))


def run_in_batches(
    items: Sequence[Item],
    width: Callable[[Item], int],
    limit: BatchLimit,
    run: Callable[[list[Item]], None],
    make_room: Callable[[list[Item]], bool],
) -> None:
    """Runs all items, the longest first, so that neighbours need little padding.

    Args:
        items: what is run.
        width: tokens of an item.
        limit: the most of a batch; halved when a batch runs out of memory.
        run: runs a batch.
        make_room: frees what a batch that ran out of memory can do without; returns whether to try the same again.
            Raises UserError where nothing helps.
    """
    waiting = sorted(items, key=width, reverse=True)
    while waiting:
        batch = waiting[: limit.rows_of([width(item) for item in waiting])]
        try:
            run(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            waiting = waiting[len(batch) :]
            continue
        # Here and not above: while the error is alive, so are the tensors of the batch.
        is_worth_another = make_room(batch)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not is_worth_another:
            limit.halve(len(batch))


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` says that a batch did not fit into memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch on a CPU, CUDA outside of torch's allocator, cuBLAS
    signs = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
