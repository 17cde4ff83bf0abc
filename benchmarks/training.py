"""Router inputs once, against the full model in every epoch: wall time, block applications, metrics.

    python benchmarks/training.py --data data --output results/training_speed.json

Both runs train on the same labels from the same seed, one after the other in one process, with the same Trainer:

    reference   the frozen model runs along the labelled paths at every step, as published: 25 epochs, batch 1 with
                accumulation 16, one RouterBlock after the other
    ours        train.py's default: the frozen model runs once, its pooled windows are stored, all routers are stacked

Times cover everything between the loaded model and the trained routers: base-model passes, steps, the evaluation and
the Trainer's checkpoint of every epoch. The ratio is reference / ours.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from drllm.errors import main_guard
from drllm.provenance import commit, versions
from drllm.training.trainer import RouterTrainingConfig, quiet_libraries, train_routers

METRICS = ("macro_f1", "f1_skip", "f1_execute", "f1_repeat", "avg_layers", "routers_loss")


def compare(data: tuple[str, ...], epochs: int, warmup_steps: int, seed: int) -> dict:
    """Train twice; returns both records' times, counts and metrics, and the ratios."""
    runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        common = {
            "data": data,
            "output_dir": scratch,
            "features_dir": f"{scratch}/features",  # empty: nothing is reused
            "num_epochs": epochs,
            "warmup_steps": warmup_steps,
            "seed": seed,
        }
        choices = {"ours": {}, "reference": {"stored_features": False, "micro_batch_size": 1}}
        for name, choice in choices.items():
            print(f"--- {name}", flush=True)
            record = train_routers(RouterTrainingConfig(run_name=name, **common, **choice))
            passes = record["base_model_passes"]
            runs[name] = {
                # The reference's passes are part of its steps.
                "seconds": record["seconds_training"] + (passes["seconds"] if name == "ours" else 0),
                "forward_passes": passes["forward_passes"],
                "examples_through_the_base_model": passes["examples"],
                "block_applications": passes["block_applications"],
                "metrics": {metric: record["metrics"][metric] for metric in METRICS},
            }
    ours, reference = runs["ours"], runs["reference"]
    return {
        "runs": runs,
        "questions": record["train_examples"] + record["held_out_examples"],
        "epochs": epochs,
        "time_ratio": reference["seconds"] / ours["seconds"],
        "block_application_ratio": reference["block_applications"] / ours["block_applications"],
        "base_model": record["base_model"],
    }


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Compare, print, and write the result if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", default=["data"], help="folders of labels (default: data)")
    parser.add_argument("--epochs", type=int, default=25, help="the paper's 25 by default")
    parser.add_argument("--warmup_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the result there as JSON")
    args = parser.parse_args(argv)
    quiet_libraries()
    result = compare(tuple(args.data), args.epochs, args.warmup_steps, args.seed)
    ours, reference = result["runs"]["ours"], result["runs"]["reference"]
    print(f"\n{'':32}{'reference':>14}{'ours':>14}{'ratio':>10}")
    for name in ("seconds", "forward_passes", "block_applications"):
        ratio = reference[name] / ours[name]
        print(f"{name:32}{reference[name]:>14,.6g}{ours[name]:>14,.6g}{ratio:>10.4g}")
    for name in METRICS:
        print(f"{name:32}{reference['metrics'][name]:>14.4f}{ours['metrics'][name]:>14.4f}")
    if args.output:
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        result |= {
            "command": "python benchmarks/training.py " + " ".join(sys.argv[1:] if argv is None else argv),
            "arguments": arguments,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "commit": commit(),
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"wrote {args.output}")


if __name__ == "__main__":
    raise SystemExit(main())
