"""Decoding steps of a whole batch of rollouts, each one replay of a CUDA graph.

Where every row has a path of its own, almost every block runs twice in a step, over few tokens. Launching those kernels
one by one takes the host longer than the device needs for them. So a batch is decoded in buffers of fixed shape and
addresses, and one graph holds a whole step, from the tokens of one to those of the next: each block runs over all rows,
those that skip it keep their state, and its second visit runs over the rows that repeat it. Rows that have ended stay:
a step costs launches and weights rather than rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from train_models.cache import CACHE_NAME, PathCache
from train_models.graphs import TOLERANCE, CudaCapture, FixedSlot, reason_against, without_collection

ROWS, LENGTHS, FEWEST_REPEATS = 64, 64, 8  # shapes are rounded up, so that few of them cover all batches
MOST_SHAPES = 32  # graphs that are kept: a graph of thousands of kernels takes some megabytes


class DecodingSteps:
    """The steps of batches, from graphs that are captured once for each shape.

    The first batch of a shape runs one step both ways. If they differ, or a capture fails, stderr says so and `start`
    returns None from then on.

    Args:
        model: follows paths.
        capture: turns a function into what replays it; default: `CudaCapture`.

    Attributes:
        captures: graphs captured so far.
        is_refused: whether `start` returns None.
    """

    def __init__(self, model: PreTrainedModel, capture: Callable[[Callable], Callable] | None = None) -> None:
        self._model = model
        self._capture = capture or CudaCapture(model.device, warm_ups=1)
        self._shapes: dict[tuple[int, int, int], Steps] = {}
        self._entries = [torch.empty(0, dtype=model.dtype, device=model.device)] * 2  # of first and of second visits
        self.captures = 0
        self.is_refused = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> DecodingSteps | None:
        """Those of `model`, or None where steps are launched as usual: not on a GPU, attention of another kind."""
        return cls(model) if model.device.type == "cuda" and reason_against(model.model) is None else None

    def clear(self) -> None:
        """Gives the memory of graphs and buffers back."""
        self._shapes.clear()
        self._entries = [entries.new_empty(0) for entries in self._entries]

    def start(
        self, cache: PathCache, mask: torch.Tensor, tokens: torch.Tensor, most: int, eager: Callable[[], torch.Tensor]
    ) -> Steps | None:
        """What decodes the rows of `cache` from here on; None where that is refused.

        Args:
            cache: filled by the prompts; not read again.
            mask: [B, T], 1 for the tokens in `cache`.
            tokens: int64 [B], the first token of each response.
            most: steps that may follow.
            eager: runs one step with `cache` as usual and returns its logits [B, V]; called at most once.
        """
        if self.is_refused:
            return None
        try:
            steps, is_new = self._steps_for(cache, most)
            steps.load(cache, mask, tokens)
            if is_new:
                steps.step()
                self._compare(self._model.lm_head(steps.states()), eager())
                steps.load(cache, mask, tokens)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.clear()
            self.is_refused = True
            reason = str(error).splitlines()[0]
            print(f"decoding steps are launched one by one, since a captured one failed: {reason}", file=sys.stderr)
            steps = None
        if cache.tokens_seen > mask.shape[1]:  # by `eager`
            cache.crop(mask.shape[1] - cache.tokens_seen)
        return steps

    def _compare(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Raises RuntimeError if the logits [B, V] of a step differ by more than rounding."""
        is_finite = expected.isfinite().all(-1)  # edited paths may overflow
        found, expected = found[is_finite].float(), expected[is_finite].float()
        distance = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item() if len(expected) else 0.0
        if not distance <= TOLERANCE.get(self._model.dtype, 0.0):
            raise RuntimeError(f"its logits differ by {distance:.2g} of their norm")

    def _steps_for(self, cache: PathCache, most: int) -> tuple[Steps, bool]:
        """(steps for the shape of this batch, whether they are new)."""
        schedule = cache.schedule
        repeats = max((len(schedule.rows_of(block, 1)) for block in range(len(schedule))), default=0)
        repeats = max(FEWEST_REPEATS, 1 << (repeats - 1).bit_length()) if repeats else 0
        rows = -(-schedule.batch_size // ROWS) * ROWS + 1  # one more for the second visits that no row makes
        length = -(-(cache.tokens_seen + most + 1) // LENGTHS) * LENGTHS
        shape = rows, length, repeats
        if shape in self._shapes:
            return self._shapes[shape], False
        needed = [_entries_of(self._model, count, length) for count in (rows, repeats)]
        held = [entries.numel() for entries in self._entries]
        if needed[0] > held[0] or needed[1] > held[1]:
            self.clear()  # graphs hold addresses; and the old buffers go before the new ones are made
            # Twice the second visits, whose number is chance: new buffers cost new captures.
            sizes = max(needed[0], held[0]), max(2 * needed[1], held[1])
            self._entries = [old.new_empty(size) for old, size in zip(self._entries, sizes, strict=True)]
        if len(self._shapes) >= MOST_SHAPES:
            self._shapes.clear()
        with without_collection():
            self._shapes[shape] = Steps(self._model, shape, self._entries, self._capture)
        self.captures += 1
        return self._shapes[shape], True


def _shape_of(model: PreTrainedModel, rows: int, length: int) -> tuple[int, ...]:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2, config.num_hidden_layers, rows, config.num_key_value_heads, length, head_dim  # 2: keys and values


def _entries_of(model: PreTrainedModel, rows: int, length: int) -> int:
    return torch.Size(_shape_of(model, rows, length)).numel()


class Steps:
    """The buffers and the graph for one number of rows, one length of the cache and one number of repeats a block."""

    def __init__(self, model: PreTrainedModel, shape: tuple[int, int, int], entries: list[torch.Tensor], capture):
        self._model, (rows, length, repeats) = model, shape
        blocks, device = model.config.num_hidden_layers, model.device
        self._first, self._second = (
            held[: _entries_of(model, count, length)].view(_shape_of(model, count, length))
            for held, count in zip(entries, (rows, repeats), strict=True)
        )
        self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._hidden = torch.zeros(rows, 1, model.config.hidden_size, dtype=model.dtype, device=device)
        self._mask = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)  # in the cache
        self._position_ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._runs = torch.ones(blocks, rows, 1, 1, dtype=torch.bool, device=device)
        self._repeats = torch.full((blocks, repeats), rows - 1, device=device)
        self._rows = rows  # of the batch that is decoded
        self._first.zero_()  # the runs before a capture attend to it
        self._second.zero_()
        self._replay = capture(self._step)

    def _step(self) -> None:
        base = self._model.model
        hidden = base.embed_tokens(self._tokens)
        self._mask.index_fill_(3, self._position, True)
        # Made once: attention would make one of a mask in each block.
        bias = torch.zeros(self._mask.shape, dtype=hidden.dtype, device=hidden.device)
        bias.masked_fill_(~self._mask, float("-inf"))
        angles = base.rotary_emb(hidden, self._position_ids)
        for block, layer in enumerate(base.layers):
            output = self._visit(layer, hidden, bias, self._position_ids, angles, self._first[:, block])
            hidden = torch.where(self._runs[block], output, hidden)
            rows = self._repeats[block]
            if len(rows):
                repeated, masked, at = (part.index_select(0, rows) for part in (hidden, bias, self._position_ids))
                of_rows = tuple(part.index_select(0, rows) for part in angles)
                again = self._visit(layer, repeated, masked, at, of_rows, self._second[:, block])
                hidden = hidden.index_copy(0, rows, again)
        self._hidden.copy_(base.norm(hidden))
        self._tokens.copy_(self._model.lm_head(self._hidden).argmax(-1))
        self._position.add_(1)
        self._position_ids.add_(1)

    def _visit(self, layer, hidden, bias, position_ids, angles, entries) -> torch.Tensor:
        keys, values = entries
        return layer(
            hidden,
            attention_mask=bias,
            position_ids=position_ids,
            position_embeddings=angles,
            use_cache=True,
            **{CACHE_NAME: FixedSlot(keys, values, self._position)},
        )

    def load(self, cache: PathCache, mask: torch.Tensor, tokens: torch.Tensor) -> None:
        """Copies a batch, of `cache` the tokens in `mask`, and zeros everywhere else: masked entries have weight zero,
        but zero times what an earlier batch left there need not be a number."""
        schedule, seen = cache.schedule, mask.shape[1]
        self._rows, blocks = schedule.batch_size, len(schedule)
        self._first.zero_()
        self._second.zero_()
        runs = torch.zeros(blocks, self._runs.shape[1], dtype=torch.bool)
        repeats = torch.full(self._repeats.shape, self._runs.shape[1] - 1)
        for block, row_sets in enumerate(schedule):
            first, second = (schedule.rows_of(block, visit) for visit in range(2))
            runs[block, list(first)] = True
            repeats[block, : len(second)] = torch.tensor(second, dtype=torch.int64)
            for visit, row_set in enumerate(row_sets):
                layer, rows = cache.layers[block + visit * blocks], schedule.row_indices(row_set)
                for kind, stored in enumerate((layer.keys, layer.values)):
                    stored = stored[:, :, :seen]
                    if visit:
                        self._second[kind, block, : len(second), :, :seen] = stored
                    elif rows is None:
                        self._first[kind, block, : self._rows, :, :seen] = stored
                    else:
                        self._first[kind, block, :, :, :seen].index_copy_(0, rows, stored)
        self._runs.copy_(runs.view(self._runs.shape))
        self._repeats.copy_(repeats)
        self._mask.fill_(True)  # of rows that no prompt has, all of it: attention to nothing is not a number
        self._mask[: self._rows] = False
        self._mask[: self._rows, 0, 0, :seen] = mask.bool()
        self._position.fill_(seen)
        self._position_ids.zero_()
        self._position_ids[: self._rows, 0] = mask.sum(1)
        self._tokens.zero_()
        self._tokens[: self._rows, 0] = tokens

    def step(self) -> Callable[[], list[int]]:
        """Runs a step; what it returns waits for its tokens, one per row, and may be called after the next step."""
        self._replay()
        tokens = self._tokens[: self._rows, 0]
        if tokens.device.type != "cuda":
            return tokens.tolist().copy
        on_host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def wait() -> list[int]:
            done.synchronize()
            return on_host.tolist()

        return wait

    def states(self) -> torch.Tensor:
        """[B, d], the final states of the last step."""
        return self._hidden[: self._rows, 0]
