"""The generations that benchmarks/latency.py times: stock and routed models on the same weights, run in turn."""

from __future__ import annotations

import argparse
import copy
import gc
import random
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, StaticCache

from benchmarks.shapes import SHAPES
from drllm.checkpoints import load_config
from drllm.errors import UserError
from drllm.provenance import parse_dtype
from train_models import routed_classes
from train_models.cache import PathCache
from train_models.paths import EXECUTE, REPEAT, SKIP, path_to_layer_indices
from train_models.retrofitting import routed_config

MEASURES = ("path", "router", "static", "stock_again", "compiled", "compiled_whole", "stock_compiled")
ROWS = ("shared", "mixed", "two paths", "split")


@dataclass
class Timing:
    """One generation.

    Attributes:
        first: seconds to the first token.
        tokens: seconds for each later token; on a GPU, where the host runs ahead, only their mean.
        total: seconds in all.
        cache_bytes: size of the KV cache after the last token.
    """

    first: float
    tokens: list[float]
    total: float
    cache_bytes: int

    def summary(self) -> dict[str, float]:
        """Plain values, with the median over the tokens."""
        return asdict(self) | {"tokens": statistics.median(self.tokens)}


Generation = Generator[None, None, Timing]  # pauses before each forward pass


def load_models(arguments: argparse.Namespace) -> tuple:
    """(stock model, routed model on the same weights)."""
    torch.manual_seed(arguments.seed)
    dtype = parse_dtype(arguments.dtype)
    config: PreTrainedConfig = copy.deepcopy(SHAPES[arguments.shape])
    if arguments.config or arguments.model:
        try:
            if arguments.model:
                config = load_config(arguments.model)
            else:
                config = AutoConfig.from_pretrained(arguments.config, trust_remote_code=False)
            routed_classes(config.model_type)
        except (OSError, ValueError) as error:
            raise UserError(f"{arguments.config or arguments.model} is not a plain checkpoint: {error}") from None
    if arguments.blocks and not arguments.model:
        config.num_hidden_layers = arguments.blocks
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[: arguments.blocks]
    config._attn_implementation = arguments.attention
    if arguments.model:
        stock = AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=dtype, device_map=arguments.device, attn_implementation=arguments.attention
        )
        config = stock.config
    else:
        with torch.device(arguments.device):
            stock = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config_class, model_class = routed_classes(config.model_type)
    with torch.device("meta"):
        routed = model_class._from_config(
            routed_config(config, config_class, {}), dtype=dtype, attn_implementation=arguments.attention
        )
    # Both models share their tensors, so that neither has the warmer cache, and memory is needed once.
    routed.model.embed_tokens, routed.lm_head = stock.model.embed_tokens, stock.lm_head
    routed.model.layers, routed.model.norm = stock.model.layers, stock.model.norm
    routed.model.rotary_emb = stock.model.rotary_emb
    routed.model.routers.to_empty(device=arguments.device)
    routed.model.init_routers(arguments.seed)
    return stock.eval(), routed.eval()


def make_path(num_blocks: int, skips: int, repeats: int, generator: random.Random | None) -> tuple[int, ...]:
    """A path with the given numbers of skips and repeats of inner blocks: evenly spaced, or drawn by `generator`."""
    inner = list(range(1, num_blocks - 1))
    if skips + repeats > len(inner):
        raise UserError(f"--skip {skips} and --repeat {repeats} need more than the {len(inner)} inner blocks")
    if generator is not None:
        chosen = generator.sample(inner, skips + repeats)
    else:
        chosen = [inner[int((i + 0.5) * len(inner) / (skips + repeats))] for i in range(skips + repeats)]
    path = [EXECUTE] * num_blocks
    for index, block in enumerate(chosen):
        path[block] = SKIP if index < skips else REPEAT
    return tuple(path)


def decide_this_path(model, path: tuple[int, ...]) -> None:
    """Sets the last biases so that every router decides `path` for any prompt, after doing its full work."""
    with torch.no_grad():
        for router, action in zip(model.model.routers, path, strict=True):
            router.layers[-1].bias.zero_()
            router.layers[-1].bias[action] = 1e4


def cache_bytes(cache: DynamicCache) -> int:
    """Size of the keys and values that `cache` holds."""
    return sum(
        part.numel() * part.element_size()
        for layer in cache.layers
        if layer.is_initialized
        for part in (layer.keys, layer.values)
    )


def synchronize(device: str) -> None:
    """Waits until a GPU has done its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextmanager
def peak_memory(device: str) -> Iterator[list[int | None]]:
    """Yields a list that receives the peak bytes of its block; None where they are not counted."""
    peak: list[int | None] = []
    high_water = Path("/proc/self/clear_refs")
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif high_water.exists():
        high_water.write_text("5")
    yield peak
    if device.startswith("cuda"):
        peak.append(torch.cuda.max_memory_allocated())
    elif high_water.exists():
        lines = Path("/proc/self/status").read_text().splitlines()
        peak.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
    else:
        peak.append(None)


def generate(
    model, input_ids: torch.Tensor, new_tokens: int, cache: DynamicCache, step=None, within=nullcontext, **prefill
) -> Generation:
    """Greedy decoding with the same loop for all models; prefill and decoding are timed; pauses before each pass.

    Args:
        model: runs the first pass, with the arguments `prefill`.
        step: runs the later passes; default: `model`.
        within: context of each pass, which is not timed.
    """
    device, forward, arguments, token = str(input_ids.device), model, prefill, input_ids
    seconds = []
    for number in range(new_tokens):
        yield
        with within(), torch.inference_mode():
            if number < 2:
                synchronize(device)
            start = time.perf_counter()
            output = forward(token, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            if number in (0, new_tokens - 1):  # in between, the host may run ahead
                synchronize(device)
            seconds.append(time.perf_counter() - start)
        forward, arguments = model if step is None else step, {}
    decoding = seconds[1:] or [0.0]
    tokens = [statistics.mean(decoding)] if input_ids.is_cuda else decoding
    return Timing(seconds[0], tokens, sum(seconds), cache_bytes(cache))


@torch.inference_mode()
def router_seconds(model, input_ids: torch.Tensor) -> float:
    """Seconds that one prefill spends in routing: pooling windows, the routers, and waiting for their decisions."""
    device, spent = str(input_ids.device), [0.0]

    def timed(function: Callable) -> Callable:
        def call(*arguments):
            synchronize(device)
            start = time.perf_counter()
            result = function(*arguments)
            synchronize(device)
            spent[0] += time.perf_counter() - start
            return result

        return call

    make_decider = model.model._decider

    def make_timed_decider(*arguments):
        decider = timed(make_decider)(*arguments)
        decider.before_block = timed(decider.before_block)
        return decider

    model.model._decider = make_timed_decider
    try:
        model(input_ids, past_key_values=PathCache(), use_cache=True, logits_to_keep=1)
    finally:
        del model.model._decider
    return spent[0]


@dataclass
class Case:
    """One row of the table."""

    batch_size: int
    skips: int
    repeats: int
    rows: str  # one of ROWS
    paths: list[tuple[int, ...]]


def make_cases(arguments: argparse.Namespace, num_blocks: int) -> list[Case]:
    """Every combination of --batch_sizes, --skip, --repeat and --rows that differs from the others."""
    generator = random.Random(arguments.seed)
    cases = []
    for batch_size in arguments.batch_sizes:
        for skips in arguments.skip:
            for repeats in arguments.repeat:
                shared = make_path(num_blocks, skips, repeats, None)
                drawn = [make_path(num_blocks, skips, repeats, generator) for _ in range(max(2, batch_size))]
                two = [drawn[row % 2] for row in range(batch_size)]
                paths = {"shared": [shared] * batch_size, "mixed": drawn, "two paths": two, "split": two}
                for rows in arguments.rows:
                    if rows == "shared" or (batch_size > 1 and skips + repeats > 0):
                        cases.append(Case(batch_size, skips, repeats, rows, paths[rows]))
    return cases


class Runs:
    """The generations of one case by name: the stock model and those of `--measure`."""

    def __init__(self, case: Case, stock, routed, arguments: argparse.Namespace):
        generator = torch.Generator().manual_seed(arguments.seed)
        shape = (case.batch_size, arguments.prompt_tokens)
        ids = torch.randint(0, stock.config.vocab_size, shape, generator=generator)
        self.input_ids = ids.to(arguments.device)
        self.case, self.stock, self.routed, self.arguments = case, stock, routed, arguments
        self.indices = [path_to_layer_indices(path) for path in case.paths]
        self.steps, self.cache_length = arguments.new_tokens, arguments.prompt_tokens + arguments.new_tokens
        wanted = ["path"] if case.rows == "split" else arguments.measure
        if case.rows != "shared":
            wanted = [name for name in wanted if name in ("path", "compiled")]
        if case.skips + case.repeats > 0:
            wanted = [name for name in wanted if name != "static"]
        self.by_name: dict[str, Callable[[], Generation]] = {name: getattr(self, f"run_{name}") for name in wanted}
        self.by_name["stock"] = self.run_stock
        gc.collect()
        if {"compiled", "compiled_whole", "stock_compiled"} & set(wanted):
            torch._dynamo.reset()  # each case has its own shapes
            self.compiled_blocks: list = []
            self.compiled_stock = torch.compile(stock, mode=arguments.compile_mode)
            self.compiled_routed = torch.compile(routed, mode=arguments.compile_mode)
        decide_this_path(routed, case.paths[0])

    def run_stock(self) -> Generation:
        return generate(self.stock, self.input_ids, self.steps, DynamicCache(config=self.stock.config))

    run_stock_again = run_stock

    def run_path(self) -> Generation:
        if self.case.rows == "split":
            return self.run_split()
        cache = PathCache(self.routed.config)
        return generate(self.routed, self.input_ids, self.steps, cache, layer_indices=self.indices)

    def run_split(self) -> Generation:
        parts = []
        for path in sorted(set(self.case.paths)):
            rows = [row for row, other in enumerate(self.case.paths) if other == path]
            indices = path_to_layer_indices(path)
            cache = PathCache(self.routed.config)
            part = yield from generate(self.routed, self.input_ids[rows], self.steps, cache, layer_indices=indices)
            parts.append(part)
        return Timing(
            sum(part.first for part in parts),
            [sum(tokens) for tokens in zip(*(part.tokens for part in parts), strict=True)],
            sum(part.total for part in parts),
            sum(part.cache_bytes for part in parts),
        )

    def run_router(self) -> Generation:
        return generate(self.routed, self.input_ids, self.steps, PathCache(self.routed.config))

    def run_static(self) -> Generation:
        cache = PathCache(self.routed.config)
        return generate(self.routed, self.input_ids, self.steps, cache, within=self.static_routing)

    def run_compiled(self) -> Generation:
        cache = PathCache(self.routed.config, max_cache_len=self.cache_length)
        within = self.blocks_compiled
        return generate(self.routed, self.input_ids, self.steps, cache, within=within, layer_indices=self.indices)

    def run_compiled_whole(self) -> Generation:
        cache, step = PathCache(self.routed.config, max_cache_len=self.cache_length), self.compiled_routed
        return generate(self.routed, self.input_ids, self.steps, cache, step=step, layer_indices=self.indices)

    def run_stock_compiled(self) -> Generation:
        cache = StaticCache(config=self.stock.config, max_cache_len=self.cache_length)
        return generate(self.stock, self.input_ids, self.steps, cache, step=self.compiled_stock)

    @contextmanager
    def static_routing(self) -> Iterator[None]:
        self.routed.model.is_static_routing = True
        yield
        self.routed.model.is_static_routing = False

    @contextmanager
    def blocks_compiled(self) -> Iterator[None]:
        """Compiles the blocks, which are shared with the stock model and the other runs, within its block only."""
        layers = self.routed.model.layers
        if not self.compiled_blocks:
            self.routed.compile_blocks(mode=self.arguments.compile_mode)
            self.compiled_blocks = [layer._compiled_call_impl for layer in layers]
        for layer, compiled in zip(layers, self.compiled_blocks, strict=True):
            layer._compiled_call_impl = compiled
        yield
        for layer in layers:
            layer._compiled_call_impl = None

    def seconds_without_blocks(self) -> float:
        """Median seconds per token of the stock model without blocks: embedding, norm and head."""
        stock, device = self.stock, self.arguments.device
        layers, count = stock.model.layers, stock.config.num_hidden_layers
        stock.model.layers, stock.config.num_hidden_layers = layers[:0], 0
        token, seconds = self.input_ids[:, :1], []
        with torch.inference_mode():
            for _ in range(10):
                synchronize(device)
                start = time.perf_counter()
                stock(token, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                synchronize(device)
                seconds.append(time.perf_counter() - start)
        stock.model.layers, stock.config.num_hidden_layers = layers, count
        return statistics.median(seconds)


def take_turns(generations: dict[str, Generation], generator: random.Random) -> dict[str, Timing]:
    """Runs all generations to their ends, one pass of each in turn, in a new random order each time."""
    timings: dict[str, Timing] = {}
    while len(timings) < len(generations):
        names = [name for name in generations if name not in timings]
        generator.shuffle(names)
        for name in names:
            try:
                next(generations[name])
            except StopIteration as end:
                timings[name] = end.value
    return timings


@dataclass
class Measured:
    """What `time_case` measured.

    Attributes:
        timings: one per round of each run.
        peak_bytes: peak memory of each run's first round.
        without_blocks: seconds per token without blocks, one per round.
        in_routers: seconds in the routers, one per round.
    """

    timings: dict[str, list[Timing]]
    peak_bytes: dict[str, int | None]
    without_blocks: list[float]
    in_routers: list[float]


def time_case(runs: Runs, rounds: int, seed: int) -> Measured:
    """Times the runs of a case, interleaved: pass by pass on a CPU, one generation after the other on a GPU.

    Pass by pass, because the speed of a shared machine changes within a generation. On a GPU this would keep the host
    from running ahead.
    """
    generator, names = random.Random(seed), sorted(runs.by_name)
    measured = Measured({name: [] for name in names}, {}, [], [])
    for round_number in range(rounds + 1):
        generator.shuffle(names)
        results = {}
        if round_number == 0 or runs.input_ids.is_cuda:
            for name in names:
                with peak_memory(runs.arguments.device) as peak:
                    results |= take_turns({name: runs.by_name[name]()}, generator)
                measured.peak_bytes.setdefault(name, peak[0])
        else:
            results = take_turns({name: runs.by_name[name]() for name in names}, generator)
        rest = runs.seconds_without_blocks()
        routers = router_seconds(runs.routed, runs.input_ids) if "router" in names else None
        if round_number > 0:  # the first warms up, and compiles
            for name, timing in results.items():
                measured.timings[name].append(timing)
            measured.without_blocks.append(rest)
            measured.in_routers += [] if routers is None else [routers]
    return measured
