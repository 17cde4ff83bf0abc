"""Decoding beside what the memory allows: ms per token over the bytes of the weights that a path reads / bandwidth.

    python benchmarks/decode.py --shape llama-3.2-3b --dtype bfloat16 --output results/gpu/decode.json

Greedy decoding with random weights, after prompts of --prompt_tokens. For each batch size these modes take turns:

    stock       the stock model, eager
    eager       the routed model along the path, eager
    graphs      the same with `decode_with_graphs`
    compiled    the same with `compile_blocks` before it

and in each these paths: "default", "shared" (one path with --skip blocks skipped), "mixed" (as many, another path in
each row). The columns of the table:

    over bound       ms per token over the bound: bytes of the blocks that some row runs, norm and head over the copy
                     rate of the memory, measured in the same run
    saved/blocks     share of the time per token saved over what the skipped blocks take in that mode without them
                     (decode_saved_over_blocks); blocks' time is that of the default path less that of no block at all
    same tokens      share of the tokens of eager decoding; random weights in 16 bits have near ties

Then 100 prompts with 100 paths: captures, compilations and the slowest prompt after the first. On a CPU the functions
that a GPU would capture run as they are, which shows that it works and no speed.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import DynamicCache

from benchmarks.latency_runs import load_models, make_path, synchronize
from benchmarks.shapes import SHAPES
from drllm.arguments import A_GPU, MAX_SEED, add_shared, check_device, check_ranges, parse_list
from drllm.errors import UserError, main_guard
from drllm.files import check_output_file
from drllm.provenance import command_line, parse_dtype, write_result
from train_models.cache import PathCache
from train_models.graphs import DecodingGraphs
from train_models.paths import path_to_layer_indices

MODES = ("stock", "eager", "graphs", "compiled")


def copy_rate(device: str) -> float:
    """Bytes per second that copying within the memory of `device` reads and writes."""
    source = torch.empty(2**31 if device.startswith("cuda") else 2**27, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / min(seconds)


def weights_read(model, paths: list[tuple[int, ...]]) -> int:
    """Bytes of the weights that a decoding step reads: of each visit that some row makes, the norm and the head."""
    visits = [max(row) for row in zip(*paths, strict=True)]
    blocks = zip(visits, model.model.layers, strict=True)
    parts = [(count, part) for count, layer in blocks for part in layer.parameters()]
    parts += [(1, part) for module in (model.model.norm, model.lm_head) for part in module.parameters()]
    return sum(count * part.nbytes for count, part in parts)


@torch.inference_mode()
def decode(model, input_ids: torch.Tensor, new_tokens: int, cache, **prefill) -> tuple[float, torch.Tensor]:
    """(seconds per token after the first, the tokens) of greedy decoding."""
    device, arguments, tokens = str(input_ids.device), prefill, [input_ids]
    for number in range(new_tokens):
        if number == 1:
            synchronize(device)
            start = time.perf_counter()
        logits = model(tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments).logits
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
        arguments = {}
    synchronize(device)
    return (time.perf_counter() - start) / (new_tokens - 1), torch.cat(tokens[1:], 1)


class Bench:
    """The two models, the modes and what was measured."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.stock, self.routed = load_models(args)
        self.blocks = len(self.routed.model.layers)
        self.rate = copy_rate(args.device)
        self.generator = random.Random(args.seed)
        self.graphs: dict[str, DecodingGraphs] = {}
        self.compiled: list = []

    def enter(self, mode: str) -> None:
        """Sets the models to `mode`; what it captured and compiled before is kept."""
        model, layers = self.routed.model, self.routed.model.layers
        if mode == "compiled" and not self.compiled:
            self.routed.compile_blocks(dynamic=False)
            self.compiled = [layer._compiled_call_impl for layer in layers]
        for number, layer in enumerate(layers):
            layer._compiled_call_impl = self.compiled[number] if mode == "compiled" else None
        if model.graphs is not None:
            model.graphs.release()
        model.graphs = None
        if mode in ("graphs", "compiled"):
            if mode not in self.graphs:
                on_gpu = self.args.device.startswith("cuda")
                self.graphs[mode] = DecodingGraphs(model, None if on_gpu else lambda function: function)
            model.graphs = self.graphs[mode]

    def prompts(self, rows: int) -> torch.Tensor:
        """Random prompts int64 [rows, --prompt_tokens]."""
        generator = torch.Generator().manual_seed(self.args.seed + rows)
        shape = (rows, self.args.prompt_tokens)
        return torch.randint(self.stock.config.vocab_size, shape, generator=generator).to(self.args.device)

    def run(self, mode: str, input_ids: torch.Tensor, indices: list[list[int]]) -> tuple[float, torch.Tensor]:
        """`decode` in `mode`."""
        self.enter(mode)
        if mode == "stock":
            return decode(self.stock, input_ids, self.args.new_tokens, DynamicCache(config=self.stock.config))
        cache = PathCache(self.routed.config)
        return decode(self.routed, input_ids, self.args.new_tokens, cache, layer_indices=indices)

    def rows(self, batch_size: int) -> list[dict]:
        """The rows of the table for one batch size."""
        args, input_ids = self.args, self.prompts(batch_size)
        drawn = [make_path(self.blocks, args.skip, 0, self.generator) for _ in range(batch_size)]
        paths = {
            "default": [(1,) * self.blocks] * batch_size,
            "shared": [make_path(self.blocks, args.skip, 0, None)] * batch_size,
            "mixed": drawn,
            "no block": [(0,) * self.blocks] * batch_size,
        }
        if batch_size == 1:
            del paths["mixed"]
        cases = [(mode, name) for mode in args.modes for name in paths if mode != "stock" or name == "default"]
        seconds: dict[tuple, list[float]] = {case: [] for case in cases}
        tokens: dict[tuple, torch.Tensor] = {}
        for number in range(args.rounds + 1):
            self.generator.shuffle(cases)
            for mode, name in cases:
                spent, found = self.run(mode, input_ids, [path_to_layer_indices(path) for path in paths[name]])
                tokens[mode, name] = found
                if number:  # the first round captures and compiles
                    seconds[mode, name].append(spent)
        medians = {case: statistics.median(values) for case, values in seconds.items()}
        return [
            self.row(batch_size, case, medians, paths[case[1]], tokens)
            for case in sorted(cases, key=lambda case: (args.modes.index(case[0]), list(paths).index(case[1])))
            if case[1] != "no block"
        ]

    def row(self, batch_size: int, case: tuple[str, str], medians: dict, paths: list, tokens: dict) -> dict:
        """One row: the time per token of a case beside its bound and its savings."""
        mode, name = case
        bound = weights_read(self.routed, paths) / self.rate
        row = {
            "batch_size": batch_size,
            "mode": mode,
            "rows": name,
            "blocks_run": sum(any(path[block] for path in paths) for block in range(self.blocks)),
            "ms_per_token": 1000 * medians[case],
            "bound_ms": 1000 * bound,
            "over_bound": medians[case] / bound,
        }
        if "eager" in self.args.modes and mode != "stock":
            row["same_tokens"] = (tokens[case] == tokens["eager", name]).float().mean().item()
        if name in ("shared", "mixed") and self.args.skip:
            default = medians[mode, "default"]
            of_skipped = (default - medians[mode, "no block"]) * self.args.skip / self.blocks
            row["decode_saved"] = 1 - medians[case] / default
            row["decode_saved_over_blocks"] = (default - medians[case]) / of_skipped
        return row

    def many_paths(self) -> dict:
        """Captures and compilations while --prompts prompts bring as many paths, and the time per token of each."""
        mode = "compiled" if "compiled" in self.args.modes else "graphs"
        input_ids, seconds, counts = self.prompts(1), [], []
        for _ in range(self.args.prompts):
            path = make_path(self.blocks, self.generator.randrange(1, self.args.skip + 2), 1, self.generator)
            spent, _ = self.run(mode, input_ids, [path_to_layer_indices(path)])
            seconds.append(spent)
            counts.append((self.graphs[mode].captures, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
        return {
            "mode": mode,
            "prompts": self.args.prompts,
            "captures_after_the_first": counts[-1][0] - counts[0][0],
            "compilations_after_the_first": counts[-1][1] - counts[0][1],
            "ms_per_token_median": 1000 * statistics.median(seconds[1:]),
            "ms_per_token_slowest": 1000 * max(seconds[1:]),
        }

    def memory(self) -> dict:
        """Bytes of the buffers of all graphs, and on a GPU what capturing one set for one row takes in all."""
        buffers = {mode: graphs.buffer_bytes for mode, graphs in self.graphs.items()}
        if not self.args.device.startswith("cuda"):
            return {"buffer_bytes": buffers}
        self.enter("eager")
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info()[0]
        graphs = DecodingGraphs(self.routed.model)
        started = time.perf_counter()
        one_set = graphs._captured(1, 256)
        seconds = time.perf_counter() - started
        torch.cuda.empty_cache()
        return {
            "buffer_bytes": buffers,
            "one_set_bytes": before - torch.cuda.mem_get_info()[0],
            "one_set_buffer_bytes": one_set.entries.nbytes,
            "one_set_seconds": seconds,
        }


def print_rows(rows: list[dict]) -> None:
    """Prints the table of one batch size."""
    print("| batch | mode | rows | blocks | ms/token | over bound | saved | saved/blocks | same tokens |")
    print("|" + "---|" * 9)
    for row in rows:
        optional = (("decode_saved", ".1%"), ("decode_saved_over_blocks", ".2f"), ("same_tokens", ".0%"))
        cells = [format(row[name], form) if name in row else "" for name, form in optional]
        print(
            f"| {row['batch_size']} | {row['mode']} | {row['rows']} | {row['blocks_run']} "
            f"| {row['ms_per_token']:.3f} | {row['over_bound']:.2f} | " + " | ".join(cells) + " |",
            flush=True,
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. UserError for what cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="llama-3.2-3b", help="random weights at this shape")
    add("--config", help="a config.json of Llama, Qwen2 or Qwen3: random weights at its shape")
    add_shared(parser, "device", "cuda" if torch.cuda.is_available() else "cpu", A_GPU)
    add_shared(parser, "dtype", "bfloat16")
    add("--batch_sizes", default="1,16", help="rows of a batch, comma-separated")
    add("--modes", default=",".join(MODES), help=f"some of {', '.join(MODES)}; comma-separated")
    add("--skip", type=int, default=4, help="number of skipped blocks")
    add("--prompt_tokens", type=int, default=64, help="tokens of a prompt")
    add("--new_tokens", type=int, default=64, help="tokens that each row generates")
    add("--rounds", type=int, default=3, help="timed rounds; medians are reported")
    add("--prompts", type=int, default=100, help="prompts of the last part, each with a path of its own")
    add_shared(parser, "seed", 0)
    add_shared(parser, "output")
    args = parser.parse_args(argv)
    args.modes = args.modes.split(",")
    if unknown := set(args.modes) - set(MODES):
        raise UserError(f"--modes {', '.join(sorted(unknown))}: choose from {', '.join(MODES)}")
    args.batch_sizes = parse_list("batch_sizes", args.batch_sizes, int, "1,16")
    some = (1, math.inf)
    check_ranges(
        args,
        **dict.fromkeys(("batch_sizes", "prompt_tokens", "rounds"), some),
        new_tokens=(2, math.inf),
        **dict.fromkeys(("skip", "prompts"), (0, math.inf)),
        seed=(0, MAX_SEED),
    )
    parse_dtype(args.dtype)
    check_device(args.device)
    if args.output is not None:
        check_output_file(args.output, "--output")
    args.attention, args.model, args.blocks = "sdpa", None, None  # what `load_models` reads besides
    return args


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Measures, prints, and writes the result after each batch size."""
    args = parse_arguments(argv)
    started = time.time()
    bench = Bench(args)
    result: dict = {"shape": args.config or args.shape, "copy_bytes_per_second": bench.rate, "rows": []}

    def write() -> None:
        if args.output is not None:
            command = command_line("python benchmarks/decode.py", argv)
            write_result(args.output, result, command=command, seed=args.seed, seconds=time.time() - started)

    print(f"copying within memory: {bench.rate / 1e9:.0f} GB/s")
    for batch_size in args.batch_sizes:
        rows = bench.rows(batch_size)
        print_rows(rows)
        result["rows"] += rows
        write()
    if args.prompts > 1 and {"graphs", "compiled"} & set(args.modes):
        result["many_paths"] = bench.many_paths()
        print(result["many_paths"])
        write()
        result["memory"] = bench.memory()
        print(result["memory"])
        write()


if __name__ == "__main__":
    raise SystemExit(main())
