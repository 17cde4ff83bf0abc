"""Do saved layers save time? Routed against stock decoding in one run, in turn: pass by pass on a CPU.

    python benchmarks/latency.py --shape small --skip 0,2,4 --batch_sizes 1,16 --new_tokens 64
    python benchmarks/latency.py --model miniature/model --prompt_tokens 256
    benchmarks/latency.sh                                # all checked-in results; see the script for their commands

The six backbones of the paper have the four shapes llama-3.2-3b, llama-3.1-8b (base and instruct each), qwen2.5-3b and
qwen2.5-7b. Weights are random or those of --model. Router weights are random, too; their last biases are set so that
they decide the wanted path after doing their full work.

For each number of threads (the same for both sides), batch size and path the table has time to first token (TTFT), time
per output token (TPOT) and the total for the new tokens of the stock model, and of the routed one along the path as
ratios of medians over the rounds (TPOT: over the tokens of all rounds), and

    paired          the median of the ratios of single passes to the stock model's passes that ran beside them, least
                    affected by changes of the machine's speed; "again" is the stock model against itself: the noise
    saved/layers    share of the total time saved over the share of block applications saved; 1.0 is perfect
    saved/blocks    the same in decoding, against the blocks' own share of the stock model's time per token, that is
                    without embedding, norm and head, which no skipped block saves (timed as a model without blocks)
    bound           share of the stock model's time per token in blocks that no row runs: what mixed paths can save, as
                    a block's weights are read however few rows use it
    router          time inside the routers (windows, MLPs, waiting for the decision) as a share of the total
    KV x            bytes of the cache after the last token, against the stock model's
    peak x          peak memory during generation (weights included), against the stock model's; on a GPU allocated
                    memory, on Linux the process's resident set

Rows: "shared" is one path for all rows, the result of grouping rows of equal paths into batches. "mixed" gives each row
a path of its own with as many skips, "two paths" alternates two, and "split" takes those two groups apart and runs one
after the other. The stock model's batch is the same in all of them.

A ratio is marked UNUSABLE when there are fewer than five rounds or when the rounds of either side differ too much
(`benchmarks/pairs.py`). Compiled runs compile in the warm-up round: "compiled" has one graph for all blocks and paths,
"compiled whole" one per path. Decoding from CUDA graphs is measured by `benchmarks/decode.py`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.latency_report import (
    PAPER,
    noise_of,
    print_beside_paper,
    print_grouping,
    print_noise,
    print_table,
    report,
)
from benchmarks.latency_runs import MEASURES, ROWS, Runs, load_models, make_cases, time_case
from benchmarks.pairs import LEAST_PAIRS, load_per_core, parse_threads, torch_threads
from benchmarks.shapes import SHAPES
from drllm.arguments import A_GPU, MAX_SEED, add_shared, check_device, check_ranges, parse_list
from drllm.errors import UserError, main_guard
from drllm.files import check_output_file
from drllm.paper.experiment_figures import draw_latency
from drllm.provenance import command_line, parse_dtype, write_result


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line. UserError for unknown measures or rows, or a GPU that is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="small", help="random weights at this shape")
    add("--config", help="a config.json of Llama, Qwen2 or Qwen3: random weights at its shape")
    add_shared(parser, "model", about=": its weights instead of random ones")
    add("--blocks", type=int, help="number of blocks instead of the shape's own")
    add_shared(parser, "device", "cuda" if torch.cuda.is_available() else "cpu", A_GPU)
    add_shared(parser, "dtype", "float32")
    add(
        "--attention",
        choices=("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"),
        default="sdpa",
        help="attn_implementation",
    )
    add("--batch_sizes", default="1,16", help="rows of a batch, comma-separated")
    add("--skip", default="0,1,2,4", help="numbers of skipped blocks, comma-separated")
    add("--repeat", default="0", help="numbers of repeated blocks, comma-separated")
    add("--rows", default=",".join(ROWS), help=f"some of {', '.join(ROWS)}; comma-separated")
    add(
        "--measure",
        default="path,router,static",
        help="models beside the stock model: path (the given path), router (deciding routers), static (static "
        "routing), stock_again (the stock model once more: the noise), compiled (the path with compiled blocks), "
        "compiled_whole (the path with the decoding step compiled whole), stock_compiled (the stock model compiled "
        "whole), the last three with a static cache; comma-separated",
    )
    add("--compile_mode", default="default", help="torch.compile's mode")
    add("--prompt_tokens", type=int, default=64, help="tokens of a prompt")
    add("--new_tokens", type=int, default=64, help="the paper reports 1,000")
    add("--rounds", type=int, default=LEAST_PAIRS, help="timed rounds; medians are reported")
    add("--threads", default="1", help="CPU threads of both sides, comma-separated, e.g. 1,2")
    add_shared(parser, "seed", 0)
    add_shared(parser, "output")
    add("--figure", type=Path, help="draw time saved against layers saved to this file")
    arguments = parser.parse_args(argv)
    arguments.measure, arguments.rows = arguments.measure.split(","), arguments.rows.split(",")
    for name, wanted, allowed in (("measure", arguments.measure, MEASURES), ("rows", arguments.rows, ROWS)):
        if unknown := set(wanted) - set(allowed):
            raise UserError(f"--{name} {', '.join(sorted(unknown))}: choose from {', '.join(allowed)}")
    for name, example in (("batch_sizes", "1,16"), ("skip", "0,4"), ("repeat", "0,1")):
        setattr(arguments, name, parse_list(name, getattr(arguments, name), int, example))
    some, any_number = (1, math.inf), (0, math.inf)
    check_ranges(
        arguments,
        **dict.fromkeys(("batch_sizes", "blocks", "prompt_tokens", "rounds"), some),
        new_tokens=(2, math.inf),  # the first token is the prefill's, the time per token that of the others
        **dict.fromkeys(("skip", "repeat"), any_number),
        seed=(0, MAX_SEED),
    )
    arguments.threads = parse_threads(arguments.threads)
    parse_dtype(arguments.dtype)
    check_device(arguments.device)
    for name in ("output", "figure"):
        if getattr(arguments, name) is not None:
            check_output_file(getattr(arguments, name), f"--{name}")
    if arguments.device.startswith("cuda:"):
        torch.cuda.set_device(arguments.device)  # the device of `synchronize` and of memory statistics
    return arguments


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Measures all cases, prints the table, writes result and figure."""
    arguments = parse_arguments(argv)
    started = time.time()
    stock, routed = load_models(arguments)
    num_blocks = stock.config.num_hidden_layers
    rows = []
    for threads in arguments.threads:
        with torch_threads(threads):
            for case in make_cases(arguments, num_blocks):
                load = load_per_core()
                measured = time_case(Runs(case, stock, routed, arguments), arguments.rounds, arguments.seed)
                row = {"threads": threads} | report(case, measured, num_blocks)
                rows.append(row | {"load_per_core_before": load, "problems": noise_of(measured.timings, load)})
                print(
                    f"{threads} threads, batch {case.batch_size}, {case.skips} skipped, {case.repeats} repeated, "
                    f"{case.rows}: done",
                    file=sys.stderr,
                    flush=True,
                )
    print_table(rows)
    print_noise(rows)
    print_grouping(rows)
    print_beside_paper(rows, arguments.new_tokens)
    is_gpu = arguments.device.startswith("cuda")
    if not is_gpu:
        print("This run was on a CPU; there are no GPU figures in it.")
    if arguments.output:
        shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        result = {
            "arguments": shown,
            "gpu_figures": "measured" if is_gpu else "missing: this run was on a CPU",
            "paper": PAPER,
            "num_blocks": num_blocks,
            "hidden_size": stock.config.hidden_size,
            "rows": rows,
        }
        command = command_line("python benchmarks/latency.py", argv)
        write_result(arguments.output, result, command=command, seed=arguments.seed, seconds=time.time() - started)
    if arguments.figure:
        draw_latency(rows, arguments.figure)


if __name__ == "__main__":
    raise SystemExit(main())
