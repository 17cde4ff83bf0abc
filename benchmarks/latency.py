"""Do saved layers save time? Routed against stock decoding, interleaved in one run: pass by pass on a CPU.

    python benchmarks/latency.py --shape small --skip 0,2,4 --batch_sizes 1,16 --new_tokens 64
    python benchmarks/latency.py --checkpoint miniature/model --prompt_tokens 256

(a) what static routing costs, at 12 blocks of width 256:

    python benchmarks/latency.py --shape small --skip 0 --batch_sizes 1,16 --threads 1 --rounds 40 \
      --measure static,stock_again --output results/latency_static.json
    python benchmarks/latency.py --shape small --skip 0 --batch_sizes 1,16 --threads 1 --rounds 100 --new_tokens 2 \
      --measure static,stock_again --output results/latency_prefill.json

(b) what k skipped blocks of 12 save in decoding, alone and in a batch; mixed paths beside their bound; grouping:

    python benchmarks/latency.py --shape d1024 --skip 2,4 --batch_sizes 1,16 --prompt_tokens 16 --new_tokens 16 \
      --threads 1 --measure path --output results/latency_decode.json --figure results/latency_decode.png

(c) the routers' share of 1,000 new tokens at width 1024. Routers and blocks both grow with the number of blocks, so
four serve; all 1,000 tokens are run:

    python benchmarks/latency.py --shape d1024 --blocks 4 --skip 0 --batch_sizes 1 --new_tokens 1000 --rounds 3 \
      --threads 1 --measure router --output results/latency_routers.json

(d) compiled decoding:

    python benchmarks/latency.py --shape small --skip 0,4 --batch_sizes 1 --rows shared --rounds 10 --threads 1 \
      --measure path,compiled,compiled_whole,stock_compiled --output results/latency_compiled.json

(e) the paper's table, on a GPU:

    python benchmarks/latency.py --shape llama-3.2-3b --device cuda --dtype bfloat16 --new_tokens 1000 --skip 0,4 \
      --batch_sizes 1,16 --rows shared,mixed --rounds 2 --output results/latency_llama_3b.json
    python benchmarks/latency.py --shape llama-3.1-8b --device cuda --dtype bfloat16 --new_tokens 1000 --skip 0,4 \
      --batch_sizes 1,16 --rows shared,mixed --rounds 2 --output results/latency_llama_8b.json

The six backbones of the paper have the four shapes llama-3.2-3b, llama-3.1-8b (base and instruct each), qwen2.5-3b and
qwen2.5-7b. Weights are random (or a checkpoint's); router weights are random, too, and their last biases are set so
that they decide the wanted path after doing their full work.

For each batch size and path the table gives time to first token (TTFT), time per output token (TPOT) and the total for
the new tokens of the stock model, and of the routed one along the path as ratios of medians over the rounds (TPOT: over
the tokens of all rounds), and

    paired          the median of the ratios of single passes to the stock model's that ran beside them, which a machine
                    of changing speed disturbs least; "again" is the stock model against itself: the noise
    saved/layers    share of the total time saved over the share of block applications saved; 1.0 is perfect
    saved/blocks    the same in decoding against the blocks' own share of the stock model's time per token, that is
                    without embedding, norm and head, which no skipped block saves (timed as a model of no blocks)
    bound           share of the stock model's time per token in blocks that no row runs: what mixed paths can save, as
                    a block's weights are read however few rows use it
    router          time inside the routers (windows, MLPs, waiting for the decision) as a share of the total
    KV x            bytes of the cache after the last token, against the stock model's
    peak x          peak memory during generation (weights included), against the stock model's; on a GPU allocated
                    memory, on Linux the process's resident set

Rows: "shared" is one path for all rows, which is what grouping rows of like paths into batches gives. "mixed" gives
each row a path of its own with as many skips, "two paths" two in turn, and "split" takes those two groups apart and
runs one after the other. The stock model's batch is the same in all of them.

Compiled runs compile in the round that warms up: "compiled" has one graph for all blocks and paths, "compiled whole"
one a path. CUDA graphs have not been run yet: no GPU was at hand.
"""

import argparse
import copy
import gc
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    StaticCache,
)

from benchmarks.shapes import SHAPES
from drllm.errors import UserError, main_guard
from drllm.evaluation.experiment_figures import draw_latency
from drllm.provenance import commit, parse_dtype, versions
from train_models import routed_classes
from train_models.cache import PathCache
from train_models.paths import EXECUTE, REPEAT, SKIP, path_to_layer_indices
from train_models.retrofitting import routed_config

MEASURES = ("path", "router", "static", "stock_again", "compiled", "compiled_whole", "stock_compiled")
ROWS = ("shared", "mixed", "two paths", "split")
PAPER = "paper, 1,000 tokens: 34.49 s stock, 29.21 s routed (x 0.847), of which routers 0.27 s (0.92%)"


@dataclass
class Timing:
    """One generation: seconds to the first token, for each token after it, in all; bytes of the cache.

    On a GPU, where the host runs ahead, `tokens` is only the mean over the tokens.
    """

    first: float
    tokens: list[float]
    total: float
    cache_bytes: int

    def summary(self) -> dict[str, float]:
        return asdict(self) | {"tokens": statistics.median(self.tokens)}


Generation = Generator[None, None, Timing]  # pauses before each forward pass


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="random weights at this shape")
    parser.add_argument("--config", help="a config.json of Llama, Qwen2 or Qwen3: random weights at its shape")
    parser.add_argument("--checkpoint", help="a plain checkpoint: its weights instead of random ones")
    parser.add_argument("--blocks", type=int, help="so many blocks instead of the shape's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation")
    parser.add_argument("--batch_sizes", default="1,16", help="comma-separated")
    parser.add_argument("--skip", default="0,1,2,4", help="numbers of skipped blocks, comma-separated")
    parser.add_argument("--repeat", default="0", help="numbers of repeated blocks, comma-separated")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}; comma-separated")
    parser.add_argument(
        "--measure",
        default="path,router,static",
        help="besides the stock model: path (the given path), router (deciding routers), static (static routing), "
        "stock_again (the stock model once more: how far apart two runs of the same lie here), compiled (the path with "
        "compiled blocks), compiled_whole (the path with the decoding step compiled whole), stock_compiled (the stock "
        "model compiled whole), all three with a static cache; comma-separated",
    )
    parser.add_argument("--compile_mode", default="default", help="torch.compile's mode")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64, help="the paper reports 1,000")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; medians are reported")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for torch's default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="write results to this JSON file")
    parser.add_argument("--figure", help="draw time saved against layers saved to this file")
    arguments = parser.parse_args()
    arguments.measure, arguments.rows = arguments.measure.split(","), arguments.rows.split(",")
    for name, wanted, known in (("measure", arguments.measure, MEASURES), ("rows", arguments.rows, ROWS)):
        if unknown := set(wanted) - set(known):
            raise UserError(f"--{name} names {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; use --device cpu")
    if arguments.device.startswith("cuda:"):
        torch.cuda.set_device(arguments.device)  # which synchronize and the counts of memory go by
    return arguments


def load_models(arguments: argparse.Namespace) -> tuple:
    """(stock model, routed model on the same weights)."""
    torch.manual_seed(arguments.seed)
    dtype = parse_dtype(arguments.dtype)
    config: PreTrainedConfig = copy.deepcopy(SHAPES[arguments.shape])
    if arguments.config or arguments.checkpoint:
        try:
            config = AutoConfig.from_pretrained(arguments.config or arguments.checkpoint, trust_remote_code=False)
            routed_classes(config.model_type)
        except (OSError, ValueError) as error:
            raise UserError(f"{arguments.config or arguments.checkpoint} is no plain checkpoint: {error}") from None
    if arguments.blocks and not arguments.checkpoint:
        config.num_hidden_layers = arguments.blocks
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[: arguments.blocks]
    config._attn_implementation = arguments.attention
    if arguments.checkpoint:
        stock = AutoModelForCausalLM.from_pretrained(
            arguments.checkpoint, dtype=dtype, device_map=arguments.device, attn_implementation=arguments.attention
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
    # The same tensors serve both, so that neither model has the warmer memory, and memory is needed once.
    routed.model.embed_tokens, routed.lm_head = stock.model.embed_tokens, stock.lm_head
    routed.model.layers, routed.model.norm = stock.model.layers, stock.model.norm
    routed.model.rotary_emb = stock.model.rotary_emb
    routed.model.routers.to_empty(device=arguments.device)
    routed.model.init_routers(arguments.seed)
    return stock.eval(), routed.eval()


def make_path(num_blocks: int, skips: int, repeats: int, generator: random.Random | None) -> tuple[int, ...]:
    """A path with so many skips and repeats, block 0 and the last kept: spread evenly, or drawn at random."""
    inner = list(range(1, num_blocks - 1))
    if skips + repeats > len(inner):
        raise UserError(f"--skip {skips} and --repeat {repeats} need more than the {len(inner)} inner blocks")
    if generator is not None:
        chosen = generator.sample(inner, skips + repeats)
    else:
        chosen = [inner[int((i + 0.5) * len(inner) / (skips + repeats))] for i in range(skips + repeats)]
    path = [EXECUTE] * num_blocks
    for place, block in enumerate(chosen):
        path[block] = SKIP if place < skips else REPEAT
    return tuple(path)


def decide_this_path(model, path: tuple[int, ...]) -> None:
    """Sets the last biases so that every router decides `path` for any prompt, after doing its full work."""
    with torch.no_grad():
        for router, action in zip(model.model.routers, path, strict=True):
            router.layers[-1].bias.zero_()
            router.layers[-1].bias[action] = 1e4


def cache_bytes(cache: DynamicCache) -> int:
    return sum(
        part.numel() * part.element_size()
        for layer in cache.layers
        if layer.is_initialized
        for part in (layer.keys, layer.values)
    )


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextmanager
def peak_memory(device: str) -> Iterator[list[int | None]]:
    """Fills its list, once, with the peak bytes since its start; None where no one counts them."""
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
    """Greedy decoding by hand, the same loop for all models, timed at its two halves; pauses before each pass.

    The first pass is `model`'s, with the arguments `prefill`; `step`, if given, makes the others. Each pass runs in
    the context `within()`, which is not timed.
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
    generator = random.Random(arguments.seed)
    cases = []
    for batch_size in map(int, arguments.batch_sizes.split(",")):
        for skips in map(int, arguments.skip.split(",")):
            for repeats in map(int, arguments.repeat.split(",")):
                shared = make_path(num_blocks, skips, repeats, None)
                drawn = [make_path(num_blocks, skips, repeats, generator) for _ in range(max(2, batch_size))]
                two = [drawn[row % 2] for row in range(batch_size)]
                paths = {"shared": [shared] * batch_size, "mixed": drawn, "two paths": two, "split": two}
                for rows in arguments.rows:
                    if rows == "shared" or (batch_size > 1 and skips + repeats > 0):
                        cases.append(Case(batch_size, skips, repeats, rows, paths[rows]))
    return cases


class Runs:
    """The generations to time for one case, by name: the stock model, its parts, and what `--measure` asks for."""

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
            torch._dynamo.reset()  # each case has shapes of its own
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
        """Compiled blocks, which the stock model and the other runs share, for the time being."""
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
        """Median seconds a token of the stock model with no blocks: embedding, norm and head."""
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
    """Runs all of them to their ends: one pass each, in a new order, then the next."""
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
    """What `time_case` saw: a timing a round of each run, and in the runs' first round the peak of memory."""

    timings: dict[str, list[Timing]]
    peak_bytes: dict[str, int | None]
    without_blocks: list[float]
    in_routers: list[float]


def time_case(runs: Runs, rounds: int, seed: int) -> Measured:
    """Times the runs of a case, interleaved: pass by pass on a CPU, one generation after the other on a GPU.

    Pass by pass, because a machine that others use, too, changes its speed within a generation. On a GPU that would
    keep the host from running ahead.
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


def median(timings: list[Timing], field: str) -> float:
    """Over the rounds; for `tokens` over the tokens of all rounds."""
    return statistics.median(passes(timings, field))


def passes(timings: list[Timing], field: str) -> list[float]:
    values = [getattr(timing, field) for timing in timings]
    return list(itertools.chain(*values)) if field == "tokens" else values


def paired(timings: list[Timing], stock: list[Timing], field: str) -> float:
    """The median of the ratios of passes that ran next to each other: the least noisy of the figures, on a CPU."""
    pairs = zip(passes(timings, field), passes(stock, field), strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def report(case: Case, measured: Measured, num_blocks: int) -> dict:
    """The row of the table, and every timing that it comes from."""
    timings, peaks = measured.timings, measured.peak_bytes

    def ratio(name: str, field: str) -> float | None:
        if name not in timings:
            return None
        return median(timings[name], field) / median(timings["stock"], field)

    applications = statistics.mean(sum(path) for path in case.paths)
    layers_saved = 1 - applications / num_blocks
    block_share = 1 - statistics.median(measured.without_blocks) / median(timings["stock"], "tokens")
    unused = 1 - len({block for path in case.paths for block, visits in enumerate(path) if visits}) / num_blocks
    row = {
        "batch_size": case.batch_size,
        "skips": case.skips,
        "repeats": case.repeats,
        "rows": case.rows,
        "stock_first_s": median(timings["stock"], "first"),
        "stock_token_s": median(timings["stock"], "tokens"),
        "stock_total_s": median(timings["stock"], "total"),
        "stock_cache_bytes": timings["stock"][0].cache_bytes,
        "stock_peak_bytes": peaks["stock"],
        "blocks_share_of_token": block_share,
        "layers_saved": layers_saved,
        "bound_on_decode_saved": unused * block_share,
    }
    if "path" in timings:
        saved = {"first": ratio("path", "first"), "token": ratio("path", "tokens"), "total": ratio("path", "total")}
        row |= {f"{part}_ratio": value for part, value in saved.items()}
        row |= {"decode_saved": 1 - saved["token"], "cache_ratio": ratio("path", "cache_bytes")}
        row["peak_ratio"] = peaks["path"] / peaks["stock"] if peaks["stock"] else None
        if layers_saved:
            row["saved_over_layers"] = (1 - saved["total"]) / layers_saved
            row["decode_saved_over_blocks"] = (1 - saved["token"]) / (layers_saved * block_share)
    if "router" in timings:
        row["router_s"] = statistics.median(measured.in_routers)
        row["router_share"] = row["router_s"] / median(timings["router"], "total")
    for name in MEASURES[1:]:
        for part, field in (("first", "first"), ("token", "tokens"), ("total", "total")):
            row[f"{name}_{part}_ratio"] = ratio(name, field)
            row[f"{name}_{part}_paired"] = paired(timings[name], timings["stock"], field) if name in timings else None
    row["timings"] = {name: [timing.summary() for timing in each] for name, each in timings.items()}
    return row | {"seconds_without_blocks": measured.without_blocks, "seconds_in_routers": measured.in_routers}


COLUMNS = [
    ("batch_size", "batch", "d"),
    ("skips", "skip", "d"),
    ("repeats", "rep", "d"),
    ("rows", "rows", "s"),
    ("stock_first_s", "TTFT s", ".4f"),
    ("stock_token_s", "TPOT s", ".5f"),
    ("stock_total_s", "total s", ".3f"),
    ("first_ratio", "TTFT x", ".3f"),
    ("token_ratio", "TPOT x", ".3f"),
    ("total_ratio", "total x", ".3f"),
    ("layers_saved", "layers saved", ".1%"),
    ("saved_over_layers", "saved/layers", ".2f"),
    ("decode_saved", "decode saved", ".1%"),
    ("decode_saved_over_blocks", "saved/blocks", ".2f"),
    ("bound_on_decode_saved", "bound", ".1%"),
    ("router_share", "router", ".3%"),
    ("cache_ratio", "KV x", ".3f"),
    ("peak_ratio", "peak x", ".3f"),
    ("router_total_ratio", "routed total x", ".3f"),
    ("static_first_ratio", "static TTFT x", ".3f"),
    ("static_token_ratio", "static TPOT x", ".3f"),
    ("static_total_ratio", "static total x", ".3f"),
    ("static_first_paired", "static TTFT paired", ".3f"),
    ("static_token_paired", "static TPOT paired", ".3f"),
    ("stock_again_first_ratio", "again TTFT x", ".3f"),
    ("stock_again_token_ratio", "again TPOT x", ".3f"),
    ("stock_again_total_ratio", "again total x", ".3f"),
    ("stock_again_first_paired", "again TTFT paired", ".3f"),
    ("stock_again_token_paired", "again TPOT paired", ".3f"),
    ("compiled_token_ratio", "compiled TPOT x", ".3f"),
    ("compiled_whole_token_ratio", "compiled whole TPOT x", ".3f"),
    ("stock_compiled_token_ratio", "stock compiled TPOT x", ".3f"),
]


def print_table(rows: list[dict]) -> None:
    """The columns that some row fills."""
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    print("| " + " | ".join(title for _, title, _ in columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        cells = ("" if row.get(key) is None else format(row[key], form) for key, _, form in columns)
        print("| " + " | ".join(cells) + " |")


def print_grouping(rows: list[dict]) -> None:
    """What mixed paths save in decoding beside their bound, and what grouping rows of like paths brings."""
    by_case: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        by_case.setdefault((row["batch_size"], row["skips"], row["repeats"]), {})[row["rows"]] = row
    for (batch_size, skips, repeats), kinds in by_case.items():
        if "mixed" in kinds and "decode_saved" in kinds["mixed"]:
            parts = [
                f"{kind} {row['decode_saved']:.1%} (bound {row['bound_on_decode_saved']:.1%})"
                for kind, row in kinds.items()
                if "decode_saved" in row
            ]
            print(f"decoding saved at batch {batch_size}, {skips} skipped, {repeats} repeated: {', '.join(parts)}")


def machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    name = names[0].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"


@main_guard
def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    load_before = os.getloadavg() if hasattr(os, "getloadavg") else None
    stock, routed = load_models(arguments)
    num_blocks = stock.config.num_hidden_layers
    rows = []
    for case in make_cases(arguments, num_blocks):
        runs = Runs(case, stock, routed, arguments)
        rows.append(report(case, time_case(runs, arguments.rounds, arguments.seed), num_blocks))
        print(
            f"batch {case.batch_size}, {case.skips} skipped, {case.repeats} repeated, {case.rows}: done",
            file=sys.stderr,
            flush=True,
        )
    print_table(rows)
    print_grouping(rows)
    print(f"\nmachine: {machine(arguments.device)}; load before: {load_before}")
    is_gpu = arguments.device.startswith("cuda")
    if is_gpu and arguments.new_tokens == 1000:
        print(PAPER)
    if not is_gpu:
        print("The figures of a GPU are missing: this run was on a CPU.")
    if arguments.output:
        result = {
            "command": "python " + " ".join(sys.argv),
            "arguments": vars(arguments),
            "seed": arguments.seed,
            "machine": machine(arguments.device),
            "gpu_figures": "measured" if is_gpu else "missing: this run was on a CPU",
            "paper": PAPER,
            "load_average_before": load_before,
            "versions": versions(),
            "commit": commit(),
            "num_blocks": num_blocks,
            "hidden_size": stock.config.hidden_size,
            "rows": rows,
        }
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    if arguments.figure:
        draw_latency(rows, Path(arguments.figure))


if __name__ == "__main__":
    raise SystemExit(main())
