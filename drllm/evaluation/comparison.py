"""Step 3 of 3: lm-eval with and without routing on one checkpoint, then the table and figures.

    ./eval.sh CHECKPOINT [--tasks drllm_arc,drllm_dart] [--data_dir DIR] [--output_dir results/NAME]
    ./eval.sh SEED_0 SEED_1 SEED_2 ...        # checkpoints of several seeds: the table has their mean and spread, too

Writes, for each of the runs "base" and "router" (further checkpoints are "router-2", ..., each `--path` is
"path-..."), below --output_dir:

    {run}/results.json        lm-eval's results, with block applications counted (config.block_applications)
    {run}/samples/            lm-eval's samples, a file a task
    {run}/queries.jsonl       blocks, forward passes and path of each query
    {run}/run.json            what was run: arguments, digests of checkpoint and data, versions, commit, seconds
    {run}/command.txt, log.txt

and command.txt, labels_manifest.json, table.md, table.tex and figures/. A run that is complete with the same arguments
is kept; one that was stopped continues with the answers it already has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from drllm import provenance
from drllm.checkpoints import checkpoint_info
from drllm.errors import UserError, main_guard

ROOT = Path(__file__).resolve().parents[2]
IN_DOMAIN = "drllm_arc,drllm_dart"
BASE, ROUTER = "base", "router"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of eval.sh."""
    parser = argparse.ArgumentParser(
        prog="eval.sh",
        description="lm-eval with and without routing, then the table.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", nargs="+", help="a routed checkpoint of train.py, or several of different seeds")
    add("--base", default=None, help="plain checkpoint for the baseline; default: CHECKPOINT with static routing")
    add("--tasks", default=IN_DOMAIN, help="lm-eval tasks and groups, by comma")
    add("--data_dir", default=None, help="local files for the in-domain tasks, in the Hub's schema; default: the Hub")
    add("--output_dir", default=None, help="default: results/NAME, NAME that of the checkpoint's folder")
    add("--path", action="append", default=[], help="also run this static path, a digit 0, 1 or 2 a block; repeatable")
    add("--chat_template", choices=("auto", "on", "off"), default="auto", help="auto: as the labels were made")
    add("--dtype", default="auto", help="auto: that of the checkpoint")
    add("--batch_size", default="32", help="a number, auto or auto:N; results do not depend on it")
    add("--device", default=None, help="cuda, cuda:0, cpu, ...; default: a GPU if there is one")
    add("--num_processes", type=int, default=1, help="data-parallel processes on this machine")
    add("--num_fewshot", type=int, default=None, help="shots; default: the tasks' own")
    add("--limit", type=int, default=None, help="questions a task, for trying things out")
    add("--model_args", default="", help="further lm-eval model arguments of the routed run, e.g. routing_control=-0.3")
    add("--labels", default=None, help="folder of labels: adds the figure of their distribution")
    add("--unsafe_code", action="store_true", help="allow tasks that run generated code (humaneval)")
    add("--overwrite", action="store_true", help="replace runs of other arguments in --output_dir")
    return parser.parse_args(arguments)


def _digest_of_files(folder: Path) -> str:
    """A digest of a folder's files by name, size and time of change, and of the content of small ones."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} ".encode())
            digest.update(path.read_bytes() if status.st_size < 1 << 24 else str(status.st_mtime_ns).encode())
    return digest.hexdigest()[:16]


def uses_chat_template(setting: str, checkpoint: Path) -> bool:
    """Whether prompts get the chat template; "auto" does what the labels of the checkpoint were made with."""
    if setting != "auto":
        return setting == "on"
    manifest = checkpoint / "labels_manifest.json"
    if not manifest.is_file():
        return False
    manifests = json.loads(manifest.read_text())
    return any(part.get("chat_template", False) for part in (manifests if isinstance(manifests, list) else [manifests]))


def plan(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The runs by name: everything that their results depend on. Raises UserError for bad arguments."""
    checkpoints = [Path(checkpoint) for checkpoint in args.checkpoint]
    configs = [checkpoint_info(checkpoint, is_local=True).require_routers().fields for checkpoint in checkpoints]
    if args.data_dir is not None and not Path(args.data_dir).is_dir():
        raise UserError(f"--data_dir {args.data_dir} does not exist")
    if args.labels is not None and not Path(args.labels).is_dir():
        raise UserError(f"--labels {args.labels} does not exist")
    for path in args.path:
        blocks = configs[0]["num_hidden_layers"]
        if len(path) != blocks or not set(path) <= set("012"):
            raise UserError(f"--path {path} must have one digit 0, 1 or 2 a block, {blocks} in all")
    if len({config.get("base_model_fingerprint") for config in configs}) > 1:
        raise UserError(f"the checkpoints {', '.join(args.checkpoint)} have different base models; compare one by one")
    common = {
        "tasks": args.tasks,
        "data": None if args.data_dir is None else _digest_of_files(Path(args.data_dir)),
        "dtype": args.dtype,
        "chat_template": uses_chat_template(args.chat_template, checkpoints[0]),
        "num_fewshot": args.num_fewshot,
        "limit": args.limit,
    }
    routed, *further = (
        common | {"checkpoint": _digest_of_files(path), "pretrained": str(path)} for path in checkpoints
    )
    base = routed | {"model_args": "is_static_routing=True"}
    if args.base is not None:
        digest = _digest_of_files(Path(args.base)) if Path(args.base).is_dir() else args.base
        base = common | {"checkpoint": digest, "pretrained": args.base, "model_args": ""}
    runs = {BASE: base, ROUTER: routed | {"model_args": args.model_args}}
    for number, other in enumerate(further, start=2):
        runs[f"{ROUTER}-{number}"] = other | {"model_args": args.model_args}
    for path in args.path:
        runs[f"path-{path}"] = routed | {"model_args": f"path='{path}'"}
    return runs


def _launch_command(run: dict[str, Any], folder: Path, args: argparse.Namespace) -> list[str]:
    model_args = [f"pretrained={run['pretrained']}", f"dtype={run['dtype']}", run["model_args"]]
    model_args += [f"routing_log={folder / 'queries.jsonl'}"]
    options = {
        "--model_args": ",".join(part for part in model_args if part),
        "--tasks": run["tasks"],
        "--data_dir": args.data_dir,
        "--output_path": str(folder / "raw"),
        "--use_cache": str(folder / "answers.db"),
        "--batch_size": args.batch_size,
        "--device": args.device,
        "--num_fewshot": run["num_fewshot"],
        "--limit": run["limit"],
    }
    command = [sys.executable, "-m", "drllm.evaluate"]
    if args.num_processes > 1:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(args.num_processes)]
        command += (["--cpu"] if args.device == "cpu" else []) + ["-m", "drllm.evaluate"]
    for flag, value in options.items():
        command += [] if value is None else [flag, str(value)]
    command += ["--log_samples"] + (["--apply_chat_template"] if run["chat_template"] else [])
    return command + (["--confirm_run_unsafe_code"] if args.unsafe_code else [])


def _launch(command: list[str], log: Path) -> int:
    """Runs `command` with its output in `log`; returns its exit status. A process of its own frees all memory."""
    with log.open("w") as output:
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode


def run_lm_eval(name: str, run: dict[str, Any], folder: Path, args: argparse.Namespace) -> None:
    """Runs lm-eval for one run, unless `folder` already holds it."""
    record = folder / "run.json"
    if record.is_file():
        done = json.loads(record.read_text())["run"]
        if done == run:
            print(f"{name}: complete, kept ({folder})", flush=True)
            return
        if not args.overwrite:
            other = ", ".join(sorted(key for key in done.keys() | run.keys() if done.get(key) != run.get(key)))
            raise UserError(
                f"{folder} holds a run that differs in: {other}; choose another --output_dir, or pass --overwrite"
            )
        record.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "raw", ignore_errors=True)
    command = _launch_command(run, folder, args)
    (folder / "command.txt").write_text(shlex.join(["python", *command[1:]]) + "\n")
    log = folder / "log.txt"
    print(f"{name}: running lm-eval on {run['tasks']} (log: {log})", flush=True)
    started = time.monotonic()
    if status := _launch(command, log):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
        raise UserError(f"lm-eval ended with status {status}: {reason.removeprefix('error: ')[:500]} (see {log})")
    _collect(folder)
    details = {"run": run, "seconds": round(time.monotonic() - started, 1), "batch_size": args.batch_size}
    details |= {"versions": provenance.versions(), "commit": provenance.commit()}
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps(details, indent=2) + "\n")
    partial.replace(record)
    for leftover in folder.glob("answers.db*"):
        leftover.unlink()


def _collect(folder: Path) -> None:
    """Moves what lm-eval wrote below `raw/` to names without dates."""
    results = sorted(folder.glob("raw/**/results_*.json"))
    if not results:
        raise UserError(f"lm-eval wrote no results below {folder / 'raw'} (see {folder / 'log.txt'})")
    results[-1].replace(folder / "results.json")
    samples = folder / "samples"
    shutil.rmtree(samples, ignore_errors=True)
    samples.mkdir()
    for path in folder.glob("raw/**/samples_*.jsonl"):
        path.replace(samples / (path.stem.removeprefix("samples_").rpartition("_")[0] + ".jsonl"))
    shutil.rmtree(folder / "raw")


@main_guard
def main() -> None:
    """Runs, table, figures."""
    args = parse_arguments()
    runs = plan(args)
    output = Path(args.output_dir or ROOT / "results" / Path(args.checkpoint[0]).resolve().name)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if args.unsafe_code:  # the consent that the Hub's metric of humaneval asks for
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    output.mkdir(parents=True, exist_ok=True)
    (output / "command.txt").write_text(shlex.join(["./eval.sh", *sys.argv[1:]]) + "\n")
    manifest = Path(args.checkpoint[0]) / "labels_manifest.json"
    if manifest.is_file():
        shutil.copyfile(manifest, output / manifest.name)
    for name, run in runs.items():
        run_lm_eval(name, run, output / name, args)
    from drllm.evaluation.comparison_table import write_comparison
    from drllm.evaluation.figures import draw_comparison, write_label_counts

    print()
    print(write_comparison(output))
    if args.labels is not None:
        write_label_counts(Path(args.labels), output)
    drawn = draw_comparison(output, output / "figures")
    print("\ntable:   " + str(output / "table.md"))
    for path in drawn:
        print(f"figure:  {path}")


if __name__ == "__main__":
    raise SystemExit(main())
