"""All steps for a backbone of the paper: labels, routers, evaluations in and out of domain, tables.

    python -m experiments.paper_backbones --model llama-3.2-3b-instruct           # prints the commands and their cost
    python -m experiments.paper_backbones --model llama-3.2-3b-instruct --run     # runs them
    python -m experiments.paper_backbones --model all --slurm > backbones.sbatch  # a Slurm array, one task per backbone

Every step resumes where it was stopped and does nothing once it is complete, so run the same command to resume.
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
from transformers import AutoModelForCausalLM

from drllm.arguments import add_shared
from drllm.checkpoints import load_config
from drllm.errors import UserError, main_guard
from drllm.evaluation.protocol import GENERATION_TASKS, is_in_domain, new_token_limit
from drllm.evaluation.results import benchmarks
from drllm.files import check_output_folder
from drllm.paper import numbers

ROOT = Path(__file__).resolve().parents[1]
EVALUATIONS = {"in_domain": 3, "table4": 4, "aime24": 4, "table5": 5}  # step -> table of the paper
STEPS = ("labels", "train", *EVALUATIONS, "tables")
PAPER_GEN_KWARGS = "max_new_tokens=2048"  # Section 5, for out-of-domain tasks
DART_MAX_NEW_TOKENS = 20  # the smallest limit that all rows of Table 3 allow, see docs/reproduction_notes.md
LONG_TOKENS, LONG_ROWS = 8192, 4  # longer answers, and their rows per batch: the KV cache of 32 rows fits no GPU

# What the estimates assume beside --mfu and --pass_ms.
PEAK_FLOPS, PEAK_BYTES = 312e12, 2.0e12  # an A100 80 GB, per second: bf16 matrix products, memory
START_SECONDS = 120  # from the start of a process to its first batch
PROMPT_TOKENS = 130  # of a training question
SEARCH_ROWS, TRAIN_ROWS, EVAL_ROWS = 128, 16, 32  # the steps' default batches
WINDOWS, ROUTER_WIDTH = 8, 128
RECORD_BYTES = 3e3  # per searched or answered question


@dataclass(frozen=True)
class Backbone:
    """A model of the paper, or a local one: folder or Hub name, short name, size, and whether it is a base model."""

    model: str
    name: str
    blocks: int
    hidden_size: int
    parameters: float
    is_base: bool = False

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
    return {model["id"].rpartition("/")[2].lower(): model for model in numbers.paper_models()}


def find_backbones(names: str) -> list[Backbone]:
    """The backbones called `names`: comma-separated short names, Hub names or folders, or "all".

    Raises:
        UserError: an unknown name.
    """
    models, backbones = paper_models(), []
    for name in models if names == "all" else names.split(","):
        short = name.rstrip("/").rpartition("/")[2].lower()
        if (Path(name) / "config.json").is_file():
            backbones.append(_local_backbone(name, short))
        elif name.lower() in (short, models.get(short, {"id": ""})["id"].lower()) and short in models:
            size = {key: models[short][key] for key in ("blocks", "hidden_size", "parameters")}
            backbones.append(Backbone(models[short]["id"], short, **size, is_base="instruct" not in short))
        else:
            raise UserError(f"--model {name} is neither a folder with a model nor one of {', '.join(models)}, all")
    return backbones


def _local_backbone(folder: str, name: str) -> Backbone:
    config = load_config(folder)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    return Backbone(folder, name, config.num_hidden_layers, config.hidden_size, parameters)


def answer_tokens(task: dict[str, Any], args: argparse.Namespace) -> int:
    """Most new tokens per answer of a task of benchmarks.json under the protocol of `args`; 1 without generation."""
    limit = task["max_new_tokens"]
    if limit is None:
        return 1
    if is_in_domain(task["task"]):
        return args.dart_max_new_tokens if "dart" in task["task"] else limit[-1]
    return new_token_limit(args.gen_kwargs) or limit


class Costs:
    """Estimates for one backbone, in seconds of one GPU and in bytes; see `assumptions`."""

    def __init__(self, backbone: Backbone, args: argparse.Namespace) -> None:
        self.backbone, self.args = backbone, args
        rows = numbers.paper_table(2).rows
        sets, total = len(rows) - 1, {name: cell["value"] for name, cell in rows["Total"].items()}
        wanted = total["Sampled"] if args.samples is None else args.samples * sets
        visited = wanted / total["Sampled"] * total["Visited"]
        if args.limit is not None:
            visited = min(visited, args.limit * sets)
        self.visited, self.labels = visited, min(wanted, visited)
        self.inferences = visited * total["#Inferences"] / total["Visited"] * args.num_simulations / 50

    def a_pass(self, tokens: float) -> float:
        """Seconds of a forward pass over `tokens` tokens: the slowest of products, reading weights and launching."""
        operations, weights = 2 * self.backbone.parameters * tokens, 2 * self.backbone.parameters
        mfu = self.args.mfu
        return max(operations / (PEAK_FLOPS * mfu), weights / (PEAK_BYTES * mfu), self.args.pass_ms / 1000)

    def batches(self, rows: float, batch: int, prompt: float, new: float) -> float:
        """Seconds of answering `rows` prompts in batches, `new` tokens each (the prefill yields the first)."""
        batch = max(1, min(batch, rows))
        return rows / batch * (self.a_pass(batch * prompt) + max(new - 1, 0) * self.a_pass(batch))

    def search(self) -> tuple[float, float]:
        """Cost of the labels: seconds of one GPU, bytes on disk."""
        # Table 2: of the sampled labels a quarter is ARC's, whose answers are short.
        mean_tokens = 0.25 * 10 + 0.75 * self.args.dart_max_new_tokens
        return (
            self.batches(self.inferences, SEARCH_ROWS, PROMPT_TOKENS, mean_tokens),
            self.visited * RECORD_BYTES,
        )

    def training(self) -> tuple[float, float]:
        """Cost of the routers: seconds of one GPU, bytes on disk."""
        backbone, labels = self.backbone, self.labels
        features = self.batches(labels, TRAIN_ROWS, PROMPT_TOKENS, 1)
        products = 6 * backbone.router_parameters * WINDOWS * labels / (PEAK_FLOPS * self.args.mfu)
        steps = self.args.num_epochs * max(labels / TRAIN_ROWS * self.args.pass_ms / 1000, products)
        stored = labels * backbone.blocks * WINDOWS * backbone.hidden_size * 2
        checkpoint = 2 * backbone.parameters + 4 * backbone.router_parameters  # routers are saved alone, too
        return features + steps, stored + checkpoint

    def evaluation(self, tasks: Sequence[dict[str, Any]], rows: int) -> tuple[float, float]:
        """Cost of base and router on `tasks` of benchmarks.json, answers at full length: seconds of one GPU, bytes."""
        seconds = disk = 0.0
        for task in tasks:
            count, prompt, options = task["size"]
            count = min(count, self.args.limit or count)
            new = answer_tokens(task, self.args)
            seconds += 2 * (self.batches(count, rows, prompt, new) + self.batches(count, rows, options, 1))
            disk += 2 * count * RECORD_BYTES
        return seconds, disk


def plan(backbone: Backbone, args: argparse.Namespace) -> list[Step]:
    """The steps of `args.steps` for one backbone, in order."""
    costs = Costs(backbone, args)
    # Relative to the current folder; in the repository the commands read as in the README.
    root = os.path.relpath(ROOT)
    folder = Path(args.output_dir) / backbone.name
    checkpoint = folder / "checkpoints" / backbone.name
    data = ["--data_dir", str(args.data_dir)] if args.data_dir else []
    limit = ["--limit", str(args.limit)] if args.limit is not None else []

    def search() -> list[str]:
        launcher = ["python"]
        if args.gpus > 1:
            launcher += ["-m", "accelerate.commands.launch", "--num_processes", str(args.gpus)]
        command = [*launcher, f"{root}/data_generation.py", "--model", backbone.model, "--dataset", "arc,dart", *data]
        command += ["--num_simulations", str(args.num_simulations), "--budget", "2", "--seed", str(args.seed), *limit]
        command += ["--samples", "paper" if args.samples is None else str(args.samples)]
        command += ["--max_new_tokens", f"dart={args.dart_max_new_tokens}"]
        command += ["--inject_boxed"] if backbone.is_base else []  # Appendix A
        return [*command, "--output_dir", str(folder / "labels")]

    def train() -> list[str]:
        command = ["python", f"{root}/train.py", "--data", str(folder / "labels"), "--run_name", backbone.name]
        command += ["--output_dir", str(folder / "checkpoints"), "--num_epochs", str(args.num_epochs)]
        command += ["--warmup_steps", str(args.warmup_steps)]
        return [*command, "--seed", str(args.seed)]

    def evaluate(step: str, names: str, rows: int) -> list[str]:
        command = [f"{root}/eval.sh", str(checkpoint), "--tasks", names, *data, *limit]
        command += ["--output_dir", str(folder / "results" / step), "--labels", str(folder / "labels")]
        command += ["--batch_size", str(rows), *(["--num_processes", str(args.gpus)] if args.gpus > 1 else [])]
        command += ["--device", "cpu"] if args.gpus == 0 else []
        # In-domain runs have the template and the response format of the labels; others lm-eval's defaults, this limit.
        command += ["--gen_kwargs", args.gen_kwargs] if step != "in_domain" and args.gen_kwargs else []
        return command + (["--unsafe_code"] if step == "table5" and args.unsafe_code else [])

    planned = {"labels": (search(), *costs.search(), args.gpus), "train": (train(), *costs.training(), 1)}
    for step, table in EVALUATIONS.items():
        tasks = [task for task in benchmarks() if table in task["tables"]]
        tasks = [task for task in tasks if args.unsafe_code or not task.get("runs_code")]
        if table == 4:
            tasks = [task for task in tasks if (task["task"] == "aime24") == (step == "aime24")]
        names = GENERATION_TASKS if step == "in_domain" else ",".join(task["task"] for task in tasks)
        rows = LONG_ROWS if max(answer_tokens(task, args) for task in tasks) > LONG_TOKENS else EVAL_ROWS
        planned[step] = (evaluate(step, names, rows), *costs.evaluation(tasks, rows), args.gpus)
    planned["tables"] = (["python", "-m", "experiments.paper_tables", str(folder)], 0.0, 0.0, 0)
    steps = []
    for name in STEPS:
        if name not in args.steps:
            continue
        command, seconds, disk, gpus = planned[name]
        starts = 2 if name in EVALUATIONS else 1
        steps.append(Step(name, command, (seconds + starts * START_SECONDS * gpus) / 3600, gpus, disk))
    return steps


def assumptions(backbone: Backbone, args: argparse.Namespace) -> str:
    """What the estimates assume, in words."""
    costs = Costs(backbone, args)
    limit = new_token_limit(args.gen_kwargs)
    out_of_domain = f"{limit:,} tokens" if limit else "as the tasks limit them"
    return textwrap.fill(
        f"Assumed: A100 80 GB in bf16 at {args.mfu:.0%} (--mfu) of {PEAK_FLOPS / 1e12:.0f} TFLOP/s and of "
        f"{PEAK_BYTES / 1e12:g} TB/s; 2 FLOPs per parameter and token; at least {args.pass_ms:g} ms (--pass_ms) per "
        f"forward pass; {START_SECONDS} s to start a process. Search: {costs.inferences:,.0f} inferences on "
        f"{costs.visited:,.0f} questions for {costs.labels:,.0f} labels (Table 2: 961 thousand, 39.5 per question, "
        f"at 50 simulations), {PROMPT_TOKENS} tokens per prompt, {args.dart_max_new_tokens} per DART answer and 10 per "
        f"ARC answer, {SEARCH_ROWS} rows per batch. Training: {args.num_epochs} epochs on stored features (questions x "
        f"blocks x {WINDOWS} windows x width x 2 bytes), the full checkpoint in bf16. Evaluation: base and router, "
        f"sizes of eval_tasks/benchmarks.json, answers of full length (out of domain: {out_of_domain}), {EVAL_ROWS} "
        f"rows per batch ({LONG_ROWS} above {LONG_TOKENS:,} tokens). Not included: skips, repeats, early ends, reading "
        "the KV cache, the data sets. None of this was measured on an A100.",
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
                f"{backbone.name}: step {step.name} ended with exit status {status}; run the same command to resume"
            )


def slurm_script(backbones: list[Backbone], args: argparse.Namespace, options: Sequence[str]) -> str:
    """An sbatch script: one array task per backbone, each on one machine, with twice the estimated time."""
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
# Submit from the repository's folder with its environment active. A requeued task resumes.
set -euo pipefail
models=({models})
cd "${{SLURM_SUBMIT_DIR:-.}}"
exec python -m experiments.paper_backbones --model "${{models[$SLURM_ARRAY_TASK_ID]}}" --run {shlex.join(options)}
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.paper_backbones",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_shared(
        parser, "model", required=True, about=": several, comma-separated, of " + ", ".join(paper_models()) + "; or all"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry_run", action="store_true", help="print commands and costs (default)")
    what.add_argument("--run", action="store_true", help="run the steps, one after the other")
    what.add_argument("--slurm", action="store_true", help="print a Slurm array script that runs them")
    add("--gpus", type=int, default=8, help="GPUs of this machine; 0: the CPU (default: 8)")
    add("--output_dir", default="out/backbones", help="gets one folder per model (default: out/backbones)")
    add("--steps", default=",".join(STEPS), help="comma-separated (default: %(default)s)")
    add_shared(parser, "data_dir", says="the Hub")
    add("--samples", type=int, help="labels per set (default: the paper's)")
    add("--limit", type=int, help="questions searched per set and evaluated per task, for a quick trial")
    add("--num_simulations", type=int, default=50, help="simulations per question (default: 50)")
    add("--num_epochs", type=int, default=25, help="epochs of the training (default: 25, the paper's)")
    add("--warmup_steps", type=int, default=500, help="warm-up steps of the training (default: 500, the paper's)")
    add(
        "--dart_max_new_tokens",
        type=int,
        default=DART_MAX_NEW_TOKENS,
        help="limit on new tokens for DART, in labels and evaluation (default: %(default)s, which fits Table 3)",
    )
    add(
        "--gen_kwargs",
        default=PAPER_GEN_KWARGS,
        help="generation settings of out-of-domain tasks (default: %(default)s, the paper's; '': lm-eval's tasks' own)",
    )
    add_shared(parser, "seed", 0)
    add("--unsafe_code", action="store_true", help="include humaneval, which runs generated code")
    add("--mfu", type=float, default=0.3, help="fraction of an A100's peak that estimates assume (default: 0.3)")
    add("--pass_ms", type=float, default=40, help="minimum time of a forward pass that estimates assume (default: 40)")
    args = parser.parse_args(argv)
    args.steps = args.steps.split(",")
    if unknown := set(args.steps) - set(STEPS):
        raise UserError(f"--steps {','.join(sorted(unknown))}: choose from {', '.join(STEPS)}")
    if not 0 < args.mfu <= 1 or args.pass_ms < 0 or args.gpus < 0:
        raise UserError("--mfu must lie in (0, 1], --pass_ms and --gpus must not be negative")
    for name in ("num_simulations", "num_epochs", "dart_max_new_tokens", "samples", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    for name in ("seed", "warmup_steps"):
        if not 0 <= getattr(args, name) < 2**32:
            raise UserError(f"--{name} {getattr(args, name)}: must lie in 0..{2**32 - 1}")
    new_token_limit(args.gen_kwargs)  # raises for bad settings
    check_output_folder(args.output_dir, "--output_dir")
    return args


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Prints the plan or the Slurm script, or runs the steps."""
    given = sys.argv[1:] if argv is None else argv
    args = parse_arguments(given)
    backbones = find_backbones(args.model)
    if args.slurm:
        position = next(n for n, part in enumerate(given) if part.split("=")[0] == "--model")
        width = 1 if "=" in given[position] else 2
        options = [part for part in given[:position] + given[position + width :] if part != "--slurm"]
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
