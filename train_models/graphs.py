"""Decoding from CUDA graphs: one graph per visit of each block, replayed in the order of the path.

Launching the kernels of a decoding step one by one takes several times as long as reading the weights. A CUDA graph is
launched whole, but its kernels, shapes and addresses are fixed. So there are 2L graphs, one for each visit of each
block, and any path is an order of replays: a new path needs no new capture.

Graphs meet in fixed buffers. `hidden` [batch, 1, d] goes from block to block in place; rows whose path makes no such
visit keep theirs by a mask on the device. Keys and values have a fixed length, so there is one set of graphs for each
batch size and each length of a doubling series. At the first step after a prefill the entries of its `PathCache` are
copied into the buffers; they are copied back when anything else touches that cache (`PathCache.settle`).
"""

import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cache import CACHE_NAME, PathCache, RowSchedule
from .paths import path_to_layer_indices

FIRST_LENGTH = 256  # tokens of the shortest buffers; longer contexts double it
# cuDNN's plans are left out. Every one of these may be captured.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

CHECKED_STEPS = 3
# Largest distance of a row's final hidden state from eager decoding, relative to its norm. The kernels differ, so their
# rounding does: 8e-6 in float32 and 0.02 in bfloat16 on SmolLM2-135M. A wrong position, mask or entry of the cache
# gives distances near 1.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}

Function = Callable[[], None]


@contextlib.contextmanager
def without_collection():
    """Captures happen within it: an object that is finalised during one may call what a capture forbids."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class CudaCapture:
    """Calling it with a function captures the function in a CUDA graph, and returns what replays it.

    All graphs share one memory pool: nothing that a graph allocates is read after it.

    Args:
        device: a GPU.
        warm_ups: runs before a capture, in which libraries allocate their workspaces and compiled blocks compile.
    """

    def __init__(self, device: torch.device, warm_ups: int = 3):
        self._device, self._warm_ups = device, warm_ups
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, function: Function) -> Function:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(self._warm_ups):
                    function()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Another thread may allocate memory meanwhile, which "global" would take for an error of this capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                function()
        return graph.replay


class FixedSlot:
    """What a block's attention gets as its cache: keys and values [batch, heads, length, d], written at `position`."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor):
        self.keys, self.values, self.position = keys, values, position

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_args, **_kwargs):
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values


class _StepGraphs:
    """The buffers and graphs for one batch size and one length of the cache."""

    def __init__(self, model, batch_size: int, length: int, capture: Callable[[Function], Function]):
        config, num_blocks = model.config, len(model.layers)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        on = {"device": model.device}
        self.length = length
        self.hidden = torch.zeros(batch_size, 1, config.hidden_size, dtype=model.dtype, **on)
        self.mask = torch.ones(batch_size, 1, 1, length, dtype=torch.bool, **on)
        self.bias = torch.zeros(self.mask.shape, dtype=model.dtype, **on)  # what attention adds: 0, or minus infinity
        self.position = torch.zeros(1, dtype=torch.int64, **on)  # where the cache is written
        self.position_ids = torch.zeros(batch_size, 1, dtype=torch.int64, **on)
        self.runs = torch.ones(2, num_blocks, batch_size, 1, 1, dtype=torch.bool, **on)  # [visit, block]
        shape = (2, 2, num_blocks, batch_size, config.num_key_value_heads, length, head_dim)
        self.entries = torch.zeros(shape, dtype=model.dtype, **on)  # [keys or values, visit, block]
        self._angles = tuple(part.clone() for part in model.rotary_emb(self.hidden, self.position_ids))
        self._prepare = capture(lambda: self._fill(model))
        self._visits = [
            [capture(self._visit(model, block, visit)) for visit in range(2)] for block in range(num_blocks)
        ]

    def _fill(self, model) -> None:
        """What all blocks share. The bias is made here: attention would make one of a mask in each block."""
        self.bias.zero_().masked_fill_(~self.mask, float("-inf"))
        for buffer, part in zip(self._angles, model.rotary_emb(self.hidden, self.position_ids), strict=True):
            buffer.copy_(part)

    def _visit(self, model, block: int, visit: int) -> Function:
        keys, values = self.entries[:, visit, block]
        slot, layer, runs = FixedSlot(keys, values, self.position), model.layers[block], self.runs[visit, block]

        def run() -> None:
            output = layer(
                self.hidden,
                attention_mask=self.bias,
                position_ids=self.position_ids,
                position_embeddings=self._angles,
                use_cache=True,
                **{CACHE_NAME: slot},
            )
            torch.where(runs, output, self.hidden, out=self.hidden)

        return run

    def load(self, cache: PathCache) -> None:
        """Copies the paths and entries of `cache`. What is left of earlier prompts is zeroed: a masked entry has weight
        zero, but zero times infinity is not a number."""
        schedule = cache.schedule
        self.entries.zero_()
        self.mask.zero_()
        by_block = torch.tensor(schedule.paths()).T
        self.runs.copy_(torch.stack([by_block > 0, by_block > 1]).view(self.runs.shape))
        for buffers, layer, rows in self._in_use(cache, schedule):
            for buffer, stored in zip(buffers, (layer.keys, layer.values), strict=True):
                stored, part = stored[:, :, : cache.tokens_seen], buffer[:, :, : cache.tokens_seen]
                part.copy_(stored) if rows is None else part.index_copy_(0, rows, stored)

    def store(self, cache: PathCache, first: int) -> None:
        """Appends the entries of `cache` from token number `first` on to its slots."""
        for buffers, layer, rows in self._in_use(cache, cache.schedule):
            new = buffers[..., first : cache.tokens_seen, :]
            layer.update(*(new if rows is None else new.index_select(1, rows)))

    def _in_use(self, cache: PathCache, schedule: RowSchedule):
        for block, row_sets in enumerate(schedule):
            for visit, row_set in enumerate(row_sets):
                layer = cache.layers[block + visit * len(schedule)]
                yield self.entries[:, visit, block], layer, schedule.row_indices(row_set)

    def step(self, embeddings, mask: torch.Tensor | None, position_ids: torch.Tensor, cache: PathCache) -> torch.Tensor:
        """[batch, 1, d], the output of the last block for one more token per row."""
        seen = cache.tokens_seen + 1
        self.hidden.copy_(embeddings)
        self.position.fill_(cache.tokens_seen)
        self.position_ids.copy_(position_ids)
        known = self.mask[:, 0, 0, :seen]
        known.fill_(True) if mask is None else known[:, : mask.shape[1]].copy_(mask[:, :seen])
        self._prepare()
        for block, replays in enumerate(self._visits):
            for replay in replays[: len(cache.schedule[block])]:  # the visits that some row makes
                replay()
        return self.hidden.clone()


class DecodingGraphs:
    """Serves the decoding steps of a base model (`FollowsPaths`) from graphs; see the top of this file.

    Attributes:
        captures: sets of graphs captured so far.
        buffer_bytes: size of the keys and values in the buffers of all sets; the graphs' own memory comes on top.
    """

    def __init__(self, model, capture: Callable[[Function], Function] | None = None):
        """
        Args:
            model: the base model.
            capture: what turns a function into its replay; None: `CudaCapture`.

        Raises:
            ValueError: with the reason, for a model that cannot decode so.
        """
        if capture is None and model.device.type != "cuda":
            raise ValueError(f"decode_with_graphs needs a CUDA GPU, but the model is on {model.device}")
        if reason := reason_against(model):
            raise ValueError(f"decode_with_graphs does not apply: {reason}")
        self._model = model
        self._capture = capture or CudaCapture(model.device)
        self._lock = threading.RLock()
        self._sets: dict[tuple[int, int], _StepGraphs] = {}
        self._weights: tuple = ()
        self._held: weakref.ref | None = None  # the cache whose newest entries are in the buffers
        self._active: _StepGraphs | None = None  # the set that holds them
        self._stored = 0  # tokens that the cache has in its own slots
        self.captures = 0

    def __reduce__(self):
        return type(None), ()  # a copy of the model starts without graphs

    @property
    def buffer_bytes(self) -> int:
        return sum(graphs.entries.nbytes for graphs in self._sets.values())

    def serves(self, num_tokens: int, cache: PathCache | None) -> bool:
        """Whether a forward pass over `num_tokens` tokens per row is a decoding step."""
        is_decoding = num_tokens == 1 and cache is not None and cache.schedule is not None
        return is_decoding and not torch.compiler.is_compiling()

    def step(
        self, embeddings: torch.Tensor, mask, position_ids: torch.Tensor, cache: PathCache, wants_states
    ) -> torch.Tensor:
        """[batch, 1, d], the output of the last block; ValueError for what graphs cannot do."""
        if wants_states:
            raise ValueError("decode_with_graphs does not apply: it keeps no hidden states (output_hidden_states)")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
            raise ValueError("decode_with_graphs does not apply: it takes an attention_mask [batch, tokens] only")
        if torch.is_grad_enabled() or torch.is_autocast_enabled(embeddings.device.type):
            raise ValueError("decode_with_graphs does not apply: decode under torch.no_grad() and without autocast")
        with self._lock:
            held = self._held() if self._held is not None else None
            if held is not cache or cache.holder is not self or cache.tokens_seen == self._active.length:
                self._take(cache)
            return self._active.step(embeddings, mask, position_ids, cache)

    def release(self) -> None:
        """Gives the cache that is held its newest entries."""
        with self._lock:
            cache = self._held() if self._held is not None else None
            self._held = None
            if cache is not None and cache.holder is self:
                cache.holder = None
                if cache.tokens_seen > self._stored:
                    self._active.store(cache, self._stored)

    def _take(self, cache: PathCache) -> None:
        self.release()
        cache.settle()
        self._active = self._graphs_for(cache.schedule.batch_size, cache.tokens_seen + 1)
        self._active.load(cache)
        self._held, self._stored, cache.holder = weakref.ref(cache), cache.tokens_seen, self

    def _graphs_for(self, batch_size: int, tokens: int) -> _StepGraphs:
        model = self._model
        if reason := reason_against(model):
            raise ValueError(f"decode_with_graphs does not apply any more: {reason}")
        weights = (
            *(parameter.data_ptr() for parameter in model.parameters()),
            *(layer._compiled_call_impl for layer in model.layers),
        )
        if weights != self._weights:  # graphs hold addresses
            self._sets.clear()
            self._weights = weights
        length = FIRST_LENGTH
        while length < tokens:
            length *= 2
        if (batch_size, length) not in self._sets:
            graphs = self._captured(batch_size, length)
            self._check(graphs)
            self._sets[batch_size, length] = graphs
        return self._sets[batch_size, length]

    def _captured(self, batch_size: int, length: int) -> _StepGraphs:
        try:
            # Buffers made in inference mode could not be written outside of it.
            with without_collection(), torch.inference_mode(False), torch.no_grad(), sdpa_kernel(KERNELS):
                graphs = _StepGraphs(self._model, batch_size, length, self._capture)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(
                f"decode_with_graphs: {batch_size} rows of {length} tokens could not be captured ({reason}); call "
                "decode_with_graphs(False)"
            ) from error
        self.captures += 1
        return graphs

    @torch.no_grad()
    def _check(self, graphs: _StepGraphs) -> None:
        """Raises RuntimeError unless a few steps give the hidden states of eager decoding. They replay every graph: the
        first row runs every block twice. Others follow paths of their own, and the last one is padded on the left."""
        model, batch_size = self._model, graphs.hidden.shape[0]
        blocks, prompt_tokens = range(len(model.layers)), 6
        paths = [[2 if row == 0 else (block + row) % 3 for block in blocks] for row in range(batch_size)]
        tokens = torch.arange(batch_size * (prompt_tokens + CHECKED_STEPS), device=model.device)
        tokens = (tokens * 7 + 3).remainder(model.config.vocab_size).view(batch_size, -1)
        mask = torch.ones_like(tokens)
        mask[1:][-1:, :2] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        eager, ours = PathCache(model.config), None
        last_call, compiled = model._last_call.get(), [layer._compiled_call_impl for layer in model.layers]
        model.graphs = None  # this is the eager side
        for layer in model.layers:
            layer._compiled_call_impl = None
        try:
            for step in range(CHECKED_STEPS + 1):
                seen = prompt_tokens + step
                now = slice(0 if step == 0 else seen - 1, seen)
                if step == 1:
                    ours = copy.deepcopy(eager)
                    graphs.load(ours)
                expected = model(
                    tokens[:, now],
                    attention_mask=mask[:, :seen],
                    position_ids=positions[:, now],
                    layer_indices=[path_to_layer_indices(path) for path in paths],
                    **{CACHE_NAME: eager},
                ).last_hidden_state
                if ours is not None:
                    embeddings = model.embed_tokens(tokens[:, now])
                    found = model.norm(graphs.step(embeddings, mask[:, :seen], positions[:, now], ours))
                    ours.advance(ours.schedule, 1)
                    distance = ((found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)).max().item()
                    if not distance <= TOLERANCE.get(model.dtype, 0.0):
                        raise RuntimeError(
                            f"decode_with_graphs: on {_device_name(model.device)} step {step} differs from eager "
                            f"decoding by {distance:.2g} of the hidden state's norm; call decode_with_graphs(False)"
                        )
        finally:
            model.graphs = self
            for layer, compiled_call in zip(model.layers, compiled, strict=True):
                layer._compiled_call_impl = compiled_call
            if last_call is not None:
                model._last_call.note(*last_call)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def reason_against(model) -> str | None:
    """Why `model` cannot decode from graphs, as a clause; None where it can."""
    config, modules = model.config, list(model.layers.modules())
    rope = getattr(model.rotary_emb, "rope_type", "default")
    reasons = {
        "the model is in train mode; call model.eval()": model.training,
        "its attention back end is not 'sdpa'": config._attn_implementation != "sdpa",
        "its attention slides over a window": "sliding_attention" in model._attention_kinds,
        f"its positions are scaled by the length of the text (rope type {rope!r})": rope in ("dynamic", "longrope"),
        "its weights are quantised": getattr(config, "quantization_config", None) is not None,
        "its weights are quantised, sharded, or on several devices": any(
            type(parameter) is not nn.Parameter or parameter.device != model.device for parameter in model.parameters()
        ),
        "its blocks carry adapters; merge them first": any(hasattr(module, "disable_adapters") for module in modules),
        "its blocks have hooks, which would not run": any(
            module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook") for module in modules
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
