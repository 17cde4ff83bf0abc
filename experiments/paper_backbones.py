"""All steps for a backbone of the paper: labels, routers, Tables 2 to 6, Figures 1 and 4 to 10, the knob, latency.

    python -m experiments.paper_backbones --model llama-3.2-3b-instruct           # prints the commands and their cost
    python -m experiments.paper_backbones --model llama-3.2-3b-instruct --run     # runs them
    python -m experiments.paper_backbones --model all --slurm > backbones.sbatch  # a Slurm array, one task per backbone

Every step resumes where it was stopped, knob and latency start anew, and a complete step does nothing: run the same
command to resume.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from drllm.arguments import add_shared
from drllm.checkpoints import load_config
from drllm.errors import UserError, main_guard
from drllm.evaluation.protocol import GENERATION_TASKS, new_token_limit
from drllm.evaluation.results import benchmarks
from drllm.files import check_output_folder
from drllm.paper import numbers
from experiments.backbone_costs import (
    CARDS,
    DEFAULTS,
    EVAL_ROWS,
    START_SECONDS,
    Backbone,
    Cost,
    Costs,
    Machine,
    answer_tokens,
    assumptions,
)

ROOT = Path(__file__).resolve().parents[1]
EVALUATIONS = {"in_domain": 3, "table4": 4, "aime24": 4, "table5": 5}  # step -> table of the paper
ABLATIONS = {"table6": 2, "figure5": 13, "figure7": 6, "figure8": 6}  # step -> trainings per seed
SEEDS = "0,1,2"
# Figure 6 is the knob; Figures 4, 9 and 10 come from the labels and the results in domain.
STEPS = ("labels", "train", *EVALUATIONS, *ABLATIONS, "knob", "latency", "tables", "figures")
KNOB_POINTS, KNOB_QUESTIONS = 18, 100  # of experiments.sweep: the base and 17 values, questions per set
LATENCY: dict[str, Any] = {
    "dtype": "bfloat16",
    "batch_sizes": 1,
    "skip": "0,4",
    "rows": "shared",
    "prompt_tokens": 128,
    "new_tokens": 1000,
}
SIZES = ("blocks", "hidden_size", "parameters", "kv_size", "inner_size", "vocabulary")  # in paper.json
LATENCY_ROUNDS, LATENCY_RUNS = 6, 8  # five rounds and the warm-up; of each path the stock model and three routed ones
PAPER_GEN_KWARGS = "max_new_tokens=2048"  # Section 5, for out-of-domain tasks
DART_MAX_NEW_TOKENS = 20  # the smallest limit that all rows of Table 3 allow, see docs/reproduction_notes.md
LONG_TOKENS, LONG_ROWS = 8192, 4  # longer answers, and their rows per batch: the KV cache of 32 rows fits no GPU


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        gpu_hours, disk, memory: its estimated cost: hours of one GPU, bytes that it leaves, peak bytes on each GPU.
        gpus: how many it keeps busy.
        output: a file of a program that does not resume; the step is complete once it is there.
    """

    name: str
    command: list[str]
    gpu_hours: float
    gpus: int
    disk: float
    memory: float
    output: Path | None = None


def paper_models() -> dict[str, dict[str, Any]]:
    """The paper's models by short name, e.g. "llama-3.2-3b-instruct"."""
    return {model["id"].rpartition("/")[2].lower(): model for model in numbers.paper_models()}


def find_backbones(names: str, is_base: bool = False) -> list[Backbone]:
    """The backbones called `names`: comma-separated short names, Hub names or folders, or "all".

    Args:
        is_base: whether models that are not the paper's are base models.

    Raises:
        UserError: an unknown name.
    """
    models, backbones = paper_models(), []
    for name in models if names == "all" else names.split(","):
        short = name.rstrip("/").rpartition("/")[2].lower()
        if (Path(name) / "config.json").is_file():
            backbones.append(_other_backbone(name, short, is_base))
        elif name.lower() in (short, models.get(short, {"id": ""})["id"].lower()) and short in models:
            size = {key: models[short][key] for key in SIZES}
            backbones.append(Backbone(models[short]["id"], short, **size, is_base="instruct" not in short))
        else:
            try:
                backbones.append(_other_backbone(name, short, is_base))
            except UserError as error:
                raise UserError(
                    f"--model {name} is neither a folder with a model nor one of {', '.join(models)}, all; {error}"
                ) from None
    return backbones


def _other_backbone(model: str, name: str, is_base: bool) -> Backbone:
    config = load_config(model)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = (config.num_hidden_layers, config.hidden_size, parameters, config.num_key_value_heads * head)
    return Backbone(model, name, *sizes, config.intermediate_size, config.vocab_size, is_base)


class Commands:
    """The command of each step for one backbone, relative to the current folder, so that it reads as in the README."""

    def __init__(self, backbone: Backbone, args: argparse.Namespace) -> None:
        self.backbone, self.args = backbone, args
        self.root = os.path.relpath(ROOT)
        self.folder = Path(args.output_dir) / backbone.name
        self.labels, self.results = self.folder / "labels", self.folder / "results"
        self.checkpoint = self.folder / "checkpoints" / backbone.name
        self.data = ["--data_dir", str(args.data_dir)] if args.data_dir else []
        self.limit = ["--limit", str(args.limit)] if args.limit is not None else []
        self.device = ["--device", "cpu"] if args.gpus == 0 else []
        self.training = ["--num_epochs", str(args.num_epochs), "--warmup_steps", str(args.warmup_steps)]

    def search(self) -> list[str]:
        args, launcher = self.args, ["python"]
        if args.gpus > 1:
            launcher += ["-m", "accelerate.commands.launch", "--num_processes", str(args.gpus)]
        command = [*launcher, f"{self.root}/data_generation.py", "--model", self.backbone.model]
        command += ["--dataset", "arc,dart", *self.data, "--num_simulations", str(args.num_simulations)]
        command += ["--budget", "2", "--seed", str(args.seed), *self.limit]
        command += ["--dtype", args.dtype] if args.dtype != "auto" else []  # the later steps read it from the labels
        command += ["--samples", "paper" if args.samples is None else str(args.samples)]
        command += ["--max_new_tokens", f"dart={args.dart_max_new_tokens}"]
        command += ["--chat_template", "off", "--inject_boxed"] if self.backbone.is_base else []  # Appendix A
        return [*command, "--output_dir", str(self.labels)]

    def train(self) -> list[str]:
        command = ["python", f"{self.root}/train.py", "--data", str(self.labels), "--run_name", self.backbone.name]
        command += ["--output_dir", str(self.folder / "checkpoints"), *self.training]
        return [*command, "--seed", str(self.args.seed)]

    def evaluate(self, step: str, names: str, rows: int) -> list[str]:
        args = self.args
        command = [f"{self.root}/eval.sh", str(self.checkpoint), "--tasks", names, *self.data, *self.limit]
        command += ["--output_dir", str(self.results / step), "--labels", str(self.labels)]
        command += ["--batch_size", str(rows), *(["--num_processes", str(args.gpus)] if args.gpus > 1 else [])]
        command += self.device
        # In-domain runs have the template and the response format of the labels; others lm-eval's defaults, this limit.
        command += ["--gen_kwargs", args.gen_kwargs] if step != "in_domain" and args.gen_kwargs else []
        return command + (["--unsafe_code"] if step == "table5" and args.unsafe_code else [])

    def ablation(self, name: str) -> list[str]:
        command = ["python", "-m", "experiments.ablations", name, "--data", str(self.labels), *self.data, *self.limit]
        command += ["--seeds", SEEDS, *self.training, "--work_dir", str(self.folder / "ablations")]
        return [*command, "--output", str(self.results / "ablations")]

    def knob(self) -> list[str]:
        command = ["python", "-m", "experiments.sweep", str(self.checkpoint), "--labels", str(self.labels), *self.data]
        return [*command, *self.limit, *self.device, "--output", str(self.results / "sweep.json")]

    def latency(self) -> list[str]:
        command = ["python", f"{self.root}/benchmarks/latency.py", "--model", self.backbone.model]
        for name, value in LATENCY.items():
            command += [f"--{name}", str(value)]
        return [*command, *self.device, "--output", str(self.results / "latency.json")]

    def over_results(self, program: str) -> list[str]:
        return ["python", "-m", f"experiments.{program}", str(self.folder)]


def plan(backbone: Backbone, args: argparse.Namespace) -> list[Step]:
    """The steps of `args.steps` for one backbone, in order."""
    commands, costs, gpus = Commands(backbone, args), Costs(backbone, args), args.gpus
    planned = {"labels": (commands.search(), costs.search(), gpus), "train": (commands.train(), costs.training(), 1)}
    for step, table in EVALUATIONS.items():
        tasks = [task for task in benchmarks() if table in task["tables"]]
        tasks = [task for task in tasks if args.unsafe_code or not task.get("runs_code")]
        if table == 4:
            tasks = [task for task in tasks if (task["task"] == "aime24") == (step == "aime24")]
        names = GENERATION_TASKS if step == "in_domain" else ",".join(task["task"] for task in tasks)
        rows = LONG_ROWS if max(answer_tokens(task, args) for task in tasks) > LONG_TOKENS else EVAL_ROWS
        planned[step] = (commands.evaluate(step, names, rows), costs.evaluation(tasks, rows), gpus)
    for name, settings in ABLATIONS.items():
        planned[name] = (commands.ablation(name), costs.ablation(settings * len(SEEDS.split(","))), 1)
    planned["knob"] = (commands.knob(), costs.knob(KNOB_POINTS, args.limit or KNOB_QUESTIONS), 1)
    generations = LATENCY_ROUNDS * LATENCY_RUNS
    latency = costs.latency(generations, LATENCY["batch_sizes"], LATENCY["prompt_tokens"], LATENCY["new_tokens"])
    planned["latency"] = (commands.latency(), latency, 1)
    for name in ("tables", "figures"):
        planned[name] = (commands.over_results(f"paper_{name}"), Cost(), 0)
    outputs = {"knob": "sweep.json", "latency": "latency.json"}
    steps = []
    for name in (name for name in STEPS if name in args.steps):
        command, cost, busy = planned[name]
        busy = min(busy, gpus)
        hours = (cost.seconds + (2 if name in EVALUATIONS else 1) * START_SECONDS * busy) / 3600
        output = commands.results / outputs[name] if name in outputs else None
        steps.append(Step(name, command, hours, busy, cost.disk, cost.memory, output))
    return steps


def describe(backbone: Backbone, steps: list[Step], args: argparse.Namespace) -> str:
    """The plan as text: command, GPU hours, wall-clock hours, disk and GPU memory of each step."""
    capacity = CARDS[args.assume.card][-1]
    size = f"{backbone.parameters / 1e9:.2f} B" if backbone.parameters >= 1e8 else f"{backbone.parameters / 1e6:.2f} M"
    lines = [
        f"# {backbone.model}: {backbone.blocks} blocks of width {backbone.hidden_size}, {size} parameters, "
        f"routers {backbone.router_parameters / 1e6:.2f} M"
    ]
    for step in steps:
        cost = f"{step.gpu_hours:.2f} GPU hours, {_wall_hours(step):.2f} hours, {step.disk / 1e9:.2f} GB on disk"
        if step.memory:
            cost += f", {step.memory / 1e9:.1f} GB of GPU memory"
            if step.memory > capacity:
                cost += f", more than the {capacity / 1e9:.0f} GB of {args.assume.card}: batches are smaller"
        lines += [f"\n# {step.name}: {cost}", shlex.join(step.command)]
    gpu_hours, wall_hours = sum(step.gpu_hours for step in steps), sum(map(_wall_hours, steps))
    lines.append(
        f"\n# total: {gpu_hours:.2f} GPU hours, {wall_hours:.2f} hours on {max(args.gpus, 1)} {args.assume.card}, "
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
        if step.output and step.output.is_file():
            print(f"{step.output}: complete, kept")
            continue
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
#SBATCH --gpus-per-node={args.assume.card.partition("-")[0]}:{args.gpus}
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
    add(
        "--base_model",
        action="store_true",
        help="treat models that are not the paper's as base models: no chat template, math prompts end with \\boxed{",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--run", action="store_true", help="run the steps, one after the other; else print them, with costs"
    )
    what.add_argument("--slurm", action="store_true", help="print a Slurm array script that runs them")
    add("--gpus", type=int, default=8, help="GPUs of this machine; 0: the CPU (default: 8)")
    add("--output_dir", default="out/backbones", help="gets one folder per model (default: out/backbones)")
    add("--steps", default=",".join(STEPS), help="comma-separated (default: %(default)s)")
    add_shared(parser, "data_dir", says="the Hub")
    add_shared(parser, "dtype", "auto", "bfloat16 on a GPU, else float32")
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
    assumed = ",".join(f"{name}={value}" for name, value in DEFAULTS.items())
    add(
        "--assume",
        default="",
        help=f"what estimates assume: one of {', '.join(CARDS)}, the share of its peak that is reached, and the least "
        f"time of a forward pass (default: {assumed})",
    )
    add("--yields", type=Path, help="finished label folder with the labels per visited question (default: Table 2's)")
    args = parser.parse_args(argv)
    args.assume = Machine.of(args.assume)
    args.steps = args.steps.split(",")
    if unknown := set(args.steps) - set(STEPS):
        raise UserError(f"--steps {','.join(sorted(unknown))}: choose from {', '.join(STEPS)}")
    if args.gpus < 0:
        raise UserError(f"--gpus {args.gpus}: must not be negative")
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
    backbones = find_backbones(args.model, args.base_model)
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
            print("\n".join(f"# {line}" for line in assumptions(Costs(backbone, args)).splitlines()) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
