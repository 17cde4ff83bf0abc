"""Do saved layers save time? Routed against stock decoding, interleaved in one run.

    python benchmarks/latency.py --shape small --skip 0,2,4 --batch_sizes 1,16 --new_tokens 64
    python benchmarks/latency.py --shape llama-3.2-3b --device cuda --dtype bfloat16 --new_tokens 1000
    python benchmarks/latency.py --checkpoint checkpoints/run --prompt_tokens 256

For each batch size and path it prints time to first token, time per output token and the total for the new tokens, each
as a ratio of medians against the stock model of the same run, and

    saved/layers    share of the total time saved over the share of block applications saved; 1.0 is perfect. Embedding
                    and head are not saved by skipping blocks, so `saved/blocks` also gives it against the blocks' own
                    share of the stock model's decoding time (the total less that of a model of no blocks).
    router          what the routers cost: the routed model deciding a path against the same model given that path,
                    as a share of the total.
    KV bytes        of the cache after the last token, against the stock model's.

Rows of a batch share one path ("shared"), or each has its own with as many skips ("mixed"). A block that some row
needs is read for all, so mixed paths are set beside that bound: the share of blocks that no row runs. "grouped" runs
rows of the same path together, one group after the other.

Router weights are random; the last bias is set so that they decide the wanted path.
"""

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from drllm.errors import UserError, main_guard
from drllm.provenance import commit, parse_dtype, versions
from train_models import routed_classes
from train_models.cache import PathCache
from train_models.paths import EXECUTE, REPEAT, SKIP, path_to_layer_indices
from train_models.retrofitting import routed_config

LLAMA_3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072}
SHAPES = {
    "small": LlamaConfig(
        num_hidden_layers=12, hidden_size=256, intermediate_size=1024, num_attention_heads=8, vocab_size=1024
    ),
    "d1024": LlamaConfig(
        num_hidden_layers=12, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, vocab_size=4096
    ),
    "llama-3.2-3b": LlamaConfig(
        num_hidden_layers=28, hidden_size=3072, intermediate_size=8192, num_attention_heads=24, **LLAMA_3
    ),
    "llama-3.1-8b": LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, **LLAMA_3
    ),
    "qwen2.5-3b": Qwen2Config(
        num_hidden_layers=36, hidden_size=2048, intermediate_size=11008, num_attention_heads=16, num_key_value_heads=2
    ),
    "qwen2.5-7b": Qwen2Config(
        num_hidden_layers=28, hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4
    ),
}


@dataclass
class Timing:
    """Seconds of one generation: to the first token, and for each token after it on average."""

    first: float
    per_token: float
    total: float
    cache_bytes: int


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="random weights at this shape")
    parser.add_argument("--config", help="a config.json of Llama, Qwen2 or Qwen3: random weights at its shape")
    parser.add_argument("--checkpoint", help="a plain checkpoint: its weights instead of random ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation")
    parser.add_argument("--batch_sizes", default="1,16", help="comma-separated")
    parser.add_argument("--skip", default="0,1,2,4", help="numbers of skipped blocks, comma-separated")
    parser.add_argument("--repeat", default="0", help="numbers of repeated blocks, comma-separated")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64, help="the paper reports 1,000")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; medians are reported")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 for torch's default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="write results to this JSON file")
    parser.add_argument("--figure", help="draw time saved against layers saved to this file")
    return parser.parse_args()


def load_models(arguments: argparse.Namespace) -> tuple:
    """(stock model, routed model on the same weights)."""
    torch.manual_seed(arguments.seed)
    dtype = parse_dtype(arguments.dtype)
    config: PreTrainedConfig = SHAPES[arguments.shape]
    if arguments.config or arguments.checkpoint:
        config = AutoConfig.from_pretrained(arguments.config or arguments.checkpoint)
    config._attn_implementation = arguments.attention
    if arguments.checkpoint:
        stock = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=dtype, device_map=arguments.device)
        config = stock.config
    else:
        with torch.device(arguments.device):
            stock = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config_class, model_class = routed_classes(config.model_type)
    with torch.device("meta"):
        routed = model_class._from_config(routed_config(config, config_class, {}), dtype=dtype)
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
        if layer.get_seq_length() > 0
        for part in (layer.keys, layer.values)
    )


@torch.inference_mode()
def generate(model, input_ids: torch.Tensor, new_tokens: int, cache: DynamicCache, **prefill) -> Timing:
    """Greedy decoding by hand, the same loop for both models, timed at its two halves."""
    synchronize = torch.cuda.synchronize if input_ids.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    logits = model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **prefill).logits
    token = logits[:, -1].argmax(-1, keepdim=True)
    synchronize()
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
    synchronize()
    end = time.perf_counter()
    return Timing(first - start, (end - first) / max(1, new_tokens - 1), end - start, cache_bytes(cache))


@dataclass
class Case:
    """One row of the table."""

    batch_size: int
    skips: int
    repeats: int
    rows: str  # "shared", "mixed" or "grouped"
    paths: list[tuple[int, ...]]


def make_cases(arguments: argparse.Namespace, num_blocks: int) -> list[Case]:
    generator = random.Random(arguments.seed)
    cases = []
    for batch_size in map(int, arguments.batch_sizes.split(",")):
        for skips in map(int, arguments.skip.split(",")):
            for repeats in map(int, arguments.repeat.split(",")):
                shared = make_path(num_blocks, skips, repeats, None)
                cases.append(Case(batch_size, skips, repeats, "shared", [shared] * batch_size))
                if batch_size > 1 and skips + repeats > 0:
                    mixed = [make_path(num_blocks, skips, repeats, generator) for _ in range(batch_size)]
                    cases.append(Case(batch_size, skips, repeats, "mixed", mixed))
                    two = [make_path(num_blocks, skips, repeats, generator) for _ in range(2)]
                    in_turn = [two[row % 2] for row in range(batch_size)]
                    cases.append(Case(batch_size, skips, repeats, "two paths", in_turn))
                    cases.append(Case(batch_size, skips, repeats, "grouped", in_turn))
    return cases


def time_case(case: Case, stock, routed, arguments: argparse.Namespace) -> dict[str, list[Timing]]:
    """Timings of the stock model, of given paths and, for a shared path, of deciding routers; interleaved."""
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (case.batch_size, arguments.prompt_tokens)
    input_ids = torch.randint(0, stock.config.vocab_size, shape, generator=generator).to(arguments.device)
    indices = [path_to_layer_indices(path) for path in case.paths]
    timings: dict[str, list[Timing]] = {"stock": [], "path": [], "router": [], "static": []}
    steps = arguments.new_tokens

    def run_path() -> Timing:
        if case.rows != "grouped":
            return generate(routed, input_ids, steps, PathCache(), layer_indices=indices)
        parts = []
        for path in sorted(set(case.paths)):
            rows = [row for row, other in enumerate(case.paths) if other == path]
            one = [indices[row] for row in rows]
            parts.append(generate(routed, input_ids[rows], steps, PathCache(), layer_indices=one))
        return Timing(
            parts[0].first,
            sum(part.per_token for part in parts),
            sum(part.total for part in parts),
            sum(part.cache_bytes for part in parts),
        )

    decide_this_path(routed, case.paths[0])
    for round_number in range(arguments.rounds + 1):
        results = {"stock": generate(stock, input_ids, steps, DynamicCache(config=stock.config)), "path": run_path()}
        if case.rows == "shared":
            results["router"] = generate(routed, input_ids, steps, PathCache())
        if case.rows == "shared" and case.skips == case.repeats == 0:
            routed.model.is_static_routing = True
            results["static"] = generate(routed, input_ids, steps, PathCache())
            routed.model.is_static_routing = False
        if round_number > 0:  # the first warms up
            for name, timing in results.items():
                timings[name].append(timing)
    return timings


def time_without_blocks(stock, case: Case, arguments: argparse.Namespace) -> float:
    """Median seconds a token of the stock model with no blocks: embedding, norm and head."""
    layers, count = stock.model.layers, stock.config.num_hidden_layers
    stock.model.layers, stock.config.num_hidden_layers = layers[:0], 0
    token = torch.zeros(case.batch_size, 1, dtype=torch.long, device=arguments.device)
    seconds = []
    with torch.inference_mode():
        for _ in range(max(20, arguments.new_tokens)):
            start = time.perf_counter()
            stock(token, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            if token.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    stock.model.layers, stock.config.num_hidden_layers = layers, count
    return statistics.median(seconds)


def median(timings: list[Timing], field: str) -> float:
    return statistics.median(getattr(timing, field) for timing in timings)


def ratio(timings: dict[str, list[Timing]], name: str, reference: str, field: str) -> float:
    """Median over rounds of `name` against `reference` in the same round."""
    pairs = zip(timings[name], timings[reference], strict=True)
    return statistics.median(getattr(one, field) / getattr(other, field) for one, other in pairs)


def report(case: Case, timings: dict[str, list[Timing]], rest: float, num_blocks: int) -> dict:
    applications = statistics.mean(sum(path) for path in case.paths)
    layers_saved = 1 - applications / num_blocks
    decode, total = ratio(timings, "path", "stock", "per_token"), ratio(timings, "path", "stock", "total")
    stock_token = median(timings["stock"], "per_token")
    block_share = 1 - rest / stock_token
    unused = 1 - len({block for path in case.paths for block, visits in enumerate(path) if visits}) / num_blocks
    row = {
        "batch_size": case.batch_size,
        "skips": case.skips,
        "repeats": case.repeats,
        "rows": case.rows,
        "stock_first_s": median(timings["stock"], "first"),
        "stock_token_s": stock_token,
        "stock_total_s": median(timings["stock"], "total"),
        "first_ratio": ratio(timings, "path", "stock", "first"),
        "token_ratio": decode,
        "total_ratio": total,
        "layers_saved": layers_saved,
        "blocks_no_row_runs": unused,
        "saved_over_layers": (1 - total) / layers_saved if layers_saved else None,
        "decode_saved_over_blocks": (1 - decode) / (layers_saved * block_share) if layers_saved else None,
        "cache_ratio": timings["path"][0].cache_bytes / timings["stock"][0].cache_bytes,
    }
    if timings["router"]:
        pairs = zip(timings["router"], timings["path"], strict=True)
        row["router_share"] = statistics.median(r.first - p.first for r, p in pairs) / median(
            timings["router"], "total"
        )
    if timings["static"]:
        row["static_first_ratio"] = ratio(timings, "static", "stock", "first")
        row["static_token_ratio"] = ratio(timings, "static", "stock", "per_token")
    return row


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
    ("blocks_no_row_runs", "bound", ".1%"),
    ("saved_over_layers", "saved/layers", ".2f"),
    ("decode_saved_over_blocks", "saved/blocks", ".2f"),
    ("router_share", "router", ".2%"),
    ("cache_ratio", "KV x", ".3f"),
    ("static_first_ratio", "static TTFT x", ".3f"),
    ("static_token_ratio", "static TPOT x", ".3f"),
]


def print_table(rows: list[dict]) -> None:
    print("| " + " | ".join(title for _, title, _ in COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for row in rows:
        cells = ("" if row.get(key) is None else format(row[key], form) for key, _, form in COLUMNS)
        print("| " + " | ".join(cells) + " |")


def draw(rows: list[dict], path: str) -> None:
    """Time saved against layers saved; the diagonal is perfect."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4))
    styles = {"shared": "o", "mixed": "x", "two paths": "^", "grouped": "s"}
    for batch_size in sorted({row["batch_size"] for row in rows}):
        for kind, marker in styles.items():
            points = [row for row in rows if row["batch_size"] == batch_size and row["rows"] == kind]
            if points:
                xs = [100 * row["layers_saved"] for row in points]
                ys = [100 * (1 - row["total_ratio"]) for row in points]
                axes.plot(xs, ys, marker=marker, linestyle=":", label=f"batch {batch_size}, {kind}")
    axes.axline((0, 0), slope=1, color="black", linewidth=0.8)
    axes.set(xlabel="block applications saved (%)", ylabel="total time saved (%)")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


@main_guard
def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    stock, routed = load_models(arguments)
    num_blocks = stock.config.num_hidden_layers
    rows = []
    for case in make_cases(arguments, num_blocks):
        timings = time_case(case, stock, routed, arguments)
        rows.append(report(case, timings, time_without_blocks(stock, case, arguments), num_blocks))
        done = rows[-1]
        print(
            f"batch {case.batch_size}, {case.skips} skipped, {case.repeats} repeated, {case.rows}: "
            f"total x {done['total_ratio']:.3f}",
            file=sys.stderr,
            flush=True,
        )
    print_table(rows)
    if arguments.device.startswith("cuda"):
        machine, memory = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
        print(f"\npeak memory on {machine}: {memory / 2**30:.2f} GiB")
    else:
        machine, memory = f"CPU, {torch.get_num_threads()} threads", None
        print("\nNo figures of a GPU: this run was on a CPU.")
    if arguments.output:
        result = {
            "command": "python " + " ".join(sys.argv),
            "arguments": vars(arguments),
            "machine": machine,
            "peak_memory_bytes": memory,
            "versions": versions(),
            "commit": commit(),
            "rows": rows,
        }
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    if arguments.figure:
        draw(rows, arguments.figure)


if __name__ == "__main__":
    raise SystemExit(main())
