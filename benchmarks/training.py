"""Router inputs once, against the full model in every epoch: wall time, block applications, metrics.

    python benchmarks/training.py --data data --output results/speed/training_speed.json

Both sides train on the same labels from the same seed with the same Trainer, in turn, with the same number of threads
(`benchmarks/pairs.py`):

    reference   the frozen model runs along the labelled paths at every step, as published: 25 epochs, batch 1 with
                accumulation 16, one RouterBlock after the other
    ours        train.py's default: the frozen model runs once, its pooled windows are stored, all routers are stacked

Times cover everything between the loaded model and the trained routers: base-model passes, steps, the evaluation and
the Trainer's checkpoint of every epoch. The ratio is reference / ours.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.pairs import LEAST_PAIRS, Pairs, parse_threads, run_pairs, torch_threads
from drllm.arguments import MAX_SEED, add_shared, check_ranges
from drllm.errors import main_guard
from drllm.files import check_output_file
from drllm.provenance import command_line, write_result
from drllm.training.trainer import RouterTrainingConfig, quiet_libraries, train_routers

METRICS = ("macro_f1", "f1_skip", "f1_execute", "f1_repeat", "avg_layers", "routers_loss")


# Of RouterTrainingConfig. The reference runs the model at every step, one example at a time.
SIDES = {"ours": {}, "reference": {"stored_features": False, "micro_batch_size": 1}}


def train_side(name: str, common: dict, runs: dict) -> float:
    """Trains once; returns the seconds and puts counts and metrics into `runs`."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"output_dir": scratch, "features_dir": f"{scratch}/features"}  # empty: nothing is reused
        record = train_routers(RouterTrainingConfig(run_name=name, **common, **folders, **SIDES[name]))
    passes = record["base_model_passes"]
    runs[name] = {
        "forward_passes": passes["forward_passes"],
        "examples_through_the_base_model": passes["examples"],
        "block_applications": passes["block_applications"],
        "metrics": {metric: record["metrics"][metric] for metric in METRICS},
    }
    runs["questions"] = record["train_examples"] + record["held_out_examples"]
    runs["base_model"] = record["base_model"]
    # The reference's passes are part of its steps.
    return record["seconds_training"] + (passes["seconds"] if name == "ours" else 0)


def compare(common: dict, threads: int, pairs: int) -> tuple[dict, Pairs]:
    """Trains `pairs` times on each side; (counts and metrics by side, times)."""
    runs: dict = {}
    sides = [functools.partial(train_side, name, common, runs) for name in ("reference", "ours")]
    with torch_threads(threads):
        times = run_pairs(*sides, pairs, f"{threads} threads", warm_up=False)
    return runs, times


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Compares, prints, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", default=["data"], help="folders of labels (default: data)")
    add_shared(parser, "model", says="the one that the labels name")
    parser.add_argument("--epochs", type=int, default=25, help="passes over the labels; the paper's 25 by default")
    parser.add_argument("--warmup_steps", type=int, default=50, help="steps of linear warm-up")
    parser.add_argument("--threads", default="1", help="CPU threads of both sides, comma-separated, e.g. 1,2")
    parser.add_argument("--pairs", type=int, default=LEAST_PAIRS, help="runs of each side, in turn")
    add_shared(parser, "seed", 0)
    add_shared(parser, "output")
    args = parser.parse_args(argv)
    some = (1, math.inf)
    check_ranges(args, epochs=some, warmup_steps=(0, math.inf), pairs=some, seed=(0, MAX_SEED))
    threads_of_runs = parse_threads(args.threads)
    if args.output is not None:
        check_output_file(args.output, "--output")
    quiet_libraries()
    started = time.time()
    common = {
        "data": tuple(args.data),
        "model_id": args.model,
        "num_epochs": args.epochs,
        "warmup_steps": args.warmup_steps,
        "seed": args.seed,
    }
    times = {}
    for threads in threads_of_runs:
        runs, times[threads] = compare(common, threads, args.pairs)
    ours, reference = runs["ours"], runs["reference"]
    print(f"\n{'':32}{'reference':>14}{'ours':>14}{'ratio':>10}")
    for name in ("forward_passes", "block_applications"):
        ratio = reference[name] / ours[name]
        print(f"{name:32}{reference[name]:>14,.6g}{ours[name]:>14,.6g}{ratio:>10.4g}")
    for name in METRICS:
        print(f"{name:32}{reference['metrics'][name]:>14.4f}{ours['metrics'][name]:>14.4f}")
    for threads, pairs in times.items():
        print(f"time, {threads} threads: {pairs}")
    if args.output:
        result = {
            "runs": {"ours": ours, "reference": reference},
            "questions": runs["questions"],
            "base_model": runs["base_model"],
            "epochs": args.epochs,
            "time": {f"threads_{threads}": pairs.record() for threads, pairs in times.items()},
            "block_application_ratio": reference["block_applications"] / ours["block_applications"],
        }
        command = command_line("python benchmarks/training.py", argv)
        write_result(args.output, result, command=command, seed=args.seed, seconds=time.time() - started)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    raise SystemExit(main())
