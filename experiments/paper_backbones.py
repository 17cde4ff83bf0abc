"""All steps for a backbone of the paper: labels, routers, evaluations in and out of domain, tables.

    python -m drllm.backbones --model llama-3.2-3b-instruct             # prints the commands and what they would cost
    python -m drllm.backbones --model llama-3.2-3b-instruct --run       # runs them
    python -m drllm.backbones --model all --slurm > backbones.sbatch    # a Slurm array, one task a backbone

Every step continues where it was stopped and does nothing where it has ended, so the same command continues.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from drllm.errors import UserError, main_guard
from drllm.evaluation import paper
from drllm.evaluation.protocol import GENERATION_TASKS
from drllm.evaluation.runs import benchmarks

ROOT = Path(__file__).resolve().parents[1]
EVALUATIONS = {"in_domain": 3, "table4": 4, "aime24": 4, "table5": 5}  # step -> table of the paper
STEPS = ("labels", "train", *EVALUATIONS, "tables")
LONG_ROWS = 4  # rows a batch of aime24: the KV cache of 32 answers of 32768 tokens fits no GPU

# What the estimates assume beside --mfu and --pass_ms.
PEAK_FLOPS, PEAK_BYTES = 312e12, 2.0e12  # an A100 80 GB a second: bf16 matrix products, memory
START_SECONDS = 120  # of a process, until it computes
PROMPT_TOKENS, RESPONSE_TOKENS = 130, 14  # of a training question, the latter at most
SEARCH_ROWS, TRAIN_ROWS, EVAL_ROWS = 128, 16, 32  # the steps' default batches
WINDOWS, ROUTER_WIDTH = 8, 128
RECORD_BYTES = 3e3  # of a searched question, an answered question


@dataclass(frozen=True)
class Backbone:
    """A base model: where it is, what it is called here, and its size."""

    model: str
    name: str
    blocks: int
    hidden_size: int
    parameters: float

    @property
    def router_parameters(self) -> int:
        return self.blocks * (self.hidden_size * ROUTER_WIDTH + ROUTER_WIDTH + 3 * ROUTER_WIDTH + 3)


@dataclass(frozen=True)
class Step:
    """One command, with its estimated A100 hours, the GPUs it keeps busy and the bytes it leaves on disk."""

    name: str
    command: list[str]
    gpu_hours: float
    gpus: int
    disk: float


def paper_models() -> dict[str, dict[str, Any]]:
    """The paper's models by short name, e.g. "llama-3.2-3b-instruct"."""
    return {model["id"].rpartition("/")[2].lower(): model for model in paper.paper_models()}


def find_backbones(names: str) -> list[Backbone]:
    """The backbones called `names`: by comma short names, Hub names or folders, or "all". UserError when unknown."""
    known, found = paper_models(), []
    for name in known if names == "all" else names.split(","):
        short = name.rstrip("/").rpartition("/")[2].lower()
        if (Path(name) / "config.json").is_file():
            found.append(_local_backbone(name, short))
        elif name.lower() in (short, known.get(short, {"id": ""})["id"].lower()) and short in known:
            size = {key: known[short][key] for key in ("blocks", "hidden_size", "parameters")}
            found.append(Backbone(known[short]["id"], short, **size))
        else:
            raise UserError(f"--model {name} is neither a folder with a model nor one of {', '.join(known)}, all")
    return found


def _local_backbone(folder: str, name: str) -> Backbone:
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    return Backbone(folder, name, config.num_hidden_layers, config.hidden_size, parameters)


class Costs:
    """Estimates for one backbone, in seconds of one GPU and in bytes; see `assumptions`."""

    def __init__(self, backbone: Backbone, args: argparse.Namespace) -> None:
        self.backbone, self.args = backbone, args
        rows = paper.paper_table(2).rows
        sets, total = len(rows) - 1, {name: cell["value"] for name, cell in rows["Total"].items()}
        wanted = total["Sampled"] if args.samples is None else args.samples * sets
        visited = wanted / total["Sampled"] * total["Visited"]
        if args.limit is not None:
            visited = min(visited, args.limit * sets)
        self.visited, self.labels = visited, min(wanted, visited)
        self.inferences = visited * total["#Inferences"] / total["Visited"] * args.num_simulations / 50

    def a_pass(self, tokens: float) -> float:
        """Seconds of a forward pass over `tokens` tokens: products, reading the weights, or launching, the slowest."""
        operations, weights = 2 * self.backbone.parameters * tokens, 2 * self.backbone.parameters
        mfu = self.args.mfu
        return max(operations / (PEAK_FLOPS * mfu), weights / (PEAK_BYTES * mfu), self.args.pass_ms / 1000)

    def batches(self, rows: float, batch: int, prompt: float, new: float) -> float:
        """Seconds of answering `rows` prompts in batches, `new` tokens each (the first one comes with the prompt)."""
        batch = max(1, min(batch, rows))
        return rows / batch * (self.a_pass(batch * prompt) + max(new - 1, 0) * self.a_pass(batch))

    def search(self) -> tuple[float, float]:
        return (
            self.batches(self.inferences, SEARCH_ROWS, PROMPT_TOKENS, RESPONSE_TOKENS),
            self.visited * RECORD_BYTES,
        )

    def training(self) -> tuple[float, float]:
        backbone, labels = self.backbone, self.labels
        features = self.batches(labels, TRAIN_ROWS, PROMPT_TOKENS, 1)
        products = 6 * backbone.router_parameters * WINDOWS * labels / (PEAK_FLOPS * self.args.mfu)
        steps = self.args.num_epochs * max(labels / TRAIN_ROWS * self.args.pass_ms / 1000, products)
        stored = labels * backbone.blocks * WINDOWS * backbone.hidden_size * 2
        checkpoint = 2 * backbone.parameters + 4 * backbone.router_parameters  # routers are saved alone, too
        return features + steps, stored + checkpoint

    def evaluation(self, tasks: Sequence[dict[str, Any]], rows: int) -> tuple[float, float]:
        """Base and router on `tasks` of benchmarks.json, answers as long as they may be."""
        seconds = disk = 0.0
        for task in tasks:
            count, prompt, options = task["size"]
            count = min(count, self.args.limit or count)
            new = task["max_new_tokens"] or 1
            new = new[-1] if isinstance(new, list) else new
            seconds += 2 * (self.batches(count, rows, prompt, new) + self.batches(count, rows, options, 1))
            disk += 2 * count * RECORD_BYTES
        return seconds, disk


def plan(backbone: Backbone, args: argparse.Namespace) -> list[Step]:
    """The steps of `args.steps` for one backbone, in order."""
    costs = Costs(backbone, args)
    # commands work in the folder this is called from; in the repository they read as in the README
    root = os.path.relpath(ROOT)
    folder = Path(args.output_dir) / backbone.name
    checkpoint = folder / "checkpoints" / backbone.name
    data = ["--data_dir", args.data_dir] if args.data_dir else []
    limit = ["--limit", str(args.limit)] if args.limit is not None else []

    def search() -> list[str]:
        launcher = ["python"]
        if args.gpus > 1:
            launcher += ["-m", "accelerate.commands.launch", "--num_processes", str(args.gpus)]
        command = [*launcher, f"{root}/data_generation.py", "--model", backbone.model, "--dataset", "arc,dart", *data]
        command += ["--num_simulations", str(args.num_simulations), "--seed", str(args.seed), *limit]
        command += [] if args.samples is None else ["--samples", str(args.samples)]
        return [*command, "--output_dir", str(folder / "labels")]

    def train() -> list[str]:
        command = ["python", f"{root}/train.py", "--data", str(folder / "labels"), "--run_name", backbone.name]
        command += ["--output_dir", str(folder / "checkpoints"), "--num_epochs", str(args.num_epochs)]
        return [*command, "--seed", str(args.seed)]

    def evaluate(step: str, names: str, rows: int) -> list[str]:
        command = [f"{root}/eval.sh", str(checkpoint), "--tasks", names, *data, *limit]
        command += ["--output_dir", str(folder / "results" / step), "--labels", str(folder / "labels")]
        command += ["--batch_size", str(rows), *(["--num_processes", str(args.gpus)] if args.gpus > 1 else [])]
        command += ["--device", "cpu"] if args.gpus == 0 else []
        return command + (["--unsafe_code"] if step == "table5" and args.unsafe_code else [])

    found = {"labels": (search(), *costs.search(), args.gpus), "train": (train(), *costs.training(), 1)}
    for step, table in EVALUATIONS.items():
        tasks = [task for task in benchmarks() if table in task["tables"]]
        tasks = [task for task in tasks if args.unsafe_code or not task.get("runs_code")]
        if table == 4:
            tasks = [task for task in tasks if (task["task"] == "aime24") == (step == "aime24")]
        names = GENERATION_TASKS if step == "in_domain" else ",".join(task["task"] for task in tasks)
        rows = LONG_ROWS if step == "aime24" else EVAL_ROWS
        found[step] = (evaluate(step, names, rows), *costs.evaluation(tasks, rows), args.gpus)
    found["tables"] = (["python", "-m", "experiments.paper_tables", str(folder)], 0.0, 0.0, 0)
    steps = []
    for name in STEPS:
        if name not in args.steps:
            continue
        command, seconds, disk, gpus = found[name]
        starts = 2 if name in EVALUATIONS else 1
        steps.append(Step(name, command, (seconds + starts * START_SECONDS * gpus) / 3600, gpus, disk))
    return steps


def assumptions(backbone: Backbone, args: argparse.Namespace) -> str:
    """What the estimates rest on, in words."""
    costs = Costs(backbone, args)
    return textwrap.fill(
        f"Assumed: A100 80 GB in bf16 at {args.mfu:.0%} (--mfu) of {PEAK_FLOPS / 1e12:.0f} TFLOP/s and of "
        f"{PEAK_BYTES / 1e12:g} TB/s; 2 FLOPs a parameter and token; at least {args.pass_ms:g} ms (--pass_ms) a "
        f"forward pass; {START_SECONDS} s until a process computes. Search: {costs.inferences:,.0f} inferences on "
        f"{costs.visited:,.0f} questions for {costs.labels:,.0f} labels (Table 2: 961 thousand, 39.5 a question, "
        f"at 50 simulations), {PROMPT_TOKENS} tokens a prompt, {RESPONSE_TOKENS} an answer, {SEARCH_ROWS} rows a "
        f"batch. Training: {args.num_epochs} epochs on stored features (questions x blocks x {WINDOWS} windows x "
        "width x 2 bytes), the whole checkpoint in bf16. Evaluation: base and router, sizes of "
        f"eval_tasks/benchmarks.json, answers as long as they may be, {EVAL_ROWS} rows a batch "
        f"({LONG_ROWS} for aime24). Left out: skips, "
        "repeats, early ends, reading the KV cache, the data sets. None of this was measured on an A100.",
        width=116,
    )


def describe(backbone: Backbone, steps: list[Step], args: argparse.Namespace) -> str:
    """The plan as text: commands, A100 hours, wall-clock hours and disk of each step."""
    size = f"{backbone.parameters / 1e9:.2f} B" if backbone.parameters >= 1e8 else f"{backbone.parameters / 1e6:.2f} M"
    lines = [
        f"# {backbone.model}: {backbone.blocks} blocks of width {backbone.hidden_size}, {size} parameters, "
        f"routers {backbone.router_parameters / 1e6:.2f} M"
    ]
    for step in steps:
        lines.append(
            f"\n# {step.name}: {step.gpu_hours:.2f} A100 hours, {_wall_hours(step):.2f} hours, {step.disk / 1e9:.2f} GB"
        )
        lines.append(shlex.join(step.command))
    gpu_hours, wall_hours = sum(step.gpu_hours for step in steps), sum(map(_wall_hours, steps))
    lines.append(
        f"\n# total: {gpu_hours:.2f} A100 hours, {wall_hours:.2f} hours on {max(args.gpus, 1)} GPUs, "
        f"{sum(step.disk for step in steps) / 1e9:.2f} GB and {2 * backbone.parameters / 1e9:.2f} GB of base weights"
    )
    return "\n".join(lines)


def _wall_hours(step: Step) -> float:
    return step.gpu_hours / max(step.gpus, 1)


def run(backbone: Backbone, steps: list[Step]) -> None:
    """Runs the steps; UserError at the first that fails."""
    environment = os.environ | {"PYTHON": sys.executable}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for number, step in enumerate(steps, start=1):
        print(
            f"\n== {backbone.name}, step {number} of {len(steps)}, {step.name}: {shlex.join(step.command)}", flush=True
        )
        command = [sys.executable if part == "python" else part for part in step.command]
        if status := subprocess.run(command, env=environment, check=False).returncode:
            raise UserError(
                f"{backbone.name}: step {step.name} ended with exit status {status}; the same command continues there"
            )


def slurm_script(backbones: list[Backbone], args: argparse.Namespace, options: Sequence[str]) -> str:
    """An sbatch script: one array task a backbone, each on one machine, with twice the estimated time."""
    hours = max(sum(map(_wall_hours, plan(backbone, args))) for backbone in backbones)
    models = " ".join(shlex.quote(backbone.model) for backbone in backbones)
    return f"""#!/bin/bash
#SBATCH --job-name=drllm
#SBATCH --array=0-{len(backbones) - 1}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=a100:{args.gpus}
#SBATCH --cpus-per-task={8 * args.gpus}
#SBATCH --time={math.ceil(2 * hours)}:00:00
#SBATCH --requeue
#SBATCH --output=%x-%a.log
#SBATCH --open-mode=append
# Submit from the repository's folder with its environment active. A task that is requeued continues.
set -euo pipefail
models=({models})
cd "${{SLURM_SUBMIT_DIR:-.}}"
exec python -m drllm.backbones --model "${{models[$SLURM_ARRAY_TASK_ID]}}" --run {shlex.join(options)}
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m drllm.backbones", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="by comma: " + ", ".join(paper_models()) + ", folders; or all")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry_run", action="store_true", help="print commands and costs (default)")
    what.add_argument("--run", action="store_true", help="run the steps, one after the other")
    what.add_argument("--slurm", action="store_true", help="print a Slurm array script that runs them")
    add("--gpus", type=int, default=8, help="of this machine; 0: the CPU (default: 8)")
    add("--output_dir", default="runs/backbones", help="a folder a model below it (default: runs/backbones)")
    add("--steps", default=",".join(STEPS), help="by comma (default: %(default)s)")
    add("--data_dir", help="local files for the in-domain questions; default: the Hub")
    add("--samples", type=int, help="labels a set (default: the paper's)")
    add("--limit", type=int, help="questions searched a set and asked a task, for trying things out")
    add("--num_simulations", type=int, default=50, help="of the search, a question (default: 50)")
    add("--num_epochs", type=int, default=25, help="of the training (default: 25, the paper's)")
    add("--seed", type=int, default=0, help="of search and training (default: 0)")
    add("--unsafe_code", action="store_true", help="with humaneval, which runs generated code")
    add("--mfu", type=float, default=0.3, help="share of an A100's peak that estimates assume (default: 0.3)")
    add("--pass_ms", type=float, default=40, help="least time of a forward pass that estimates assume (default: 40)")
    args = parser.parse_args(argv)
    args.steps = args.steps.split(",")
    if unknown := set(args.steps) - set(STEPS):
        raise UserError(f"--steps {','.join(sorted(unknown))}: there are {', '.join(STEPS)}")
    if not 0 < args.mfu <= 1 or args.pass_ms < 0 or args.gpus < 0:
        raise UserError("--mfu must lie in (0, 1], --pass_ms and --gpus must not be negative")
    return args


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Prints the plan or the Slurm script, or runs the steps."""
    given = sys.argv[1:] if argv is None else argv
    args = parse_arguments(given)
    backbones = find_backbones(args.model)
    if args.slurm:
        place = next(n for n, part in enumerate(given) if part.split("=")[0] == "--model")
        width = 1 if "=" in given[place] else 2
        options = [part for part in given[:place] + given[place + width :] if part != "--slurm"]
        print(slurm_script(backbones, args, options), end="")
        return
    if args.run and torch.cuda.device_count() < args.gpus:
        raise UserError(f"this machine has {torch.cuda.device_count()} GPUs: pass --gpus {torch.cuda.device_count()}")
    for backbone in backbones:
        steps = plan(backbone, args)
        print(describe(backbone, steps, args))
        if args.run:
            run(backbone, steps)
        else:
            print("\n".join(f"# {line}" for line in assumptions(backbone, args).splitlines()) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
