"""One run of eval.sh: lm-eval in processes of its own, and a folder of what it wrote."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from drllm import provenance
from drllm.errors import UserError
from drllm.files import disk_errors, read_json, write_json

SAFE = "the answers so far are kept"
# Parts of lm-eval's results JSON that map tasks or groups to something.
PER_TASK = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


def run_lm_eval(name: str, run: dict[str, Any], folder: Path, args: argparse.Namespace) -> None:
    """Runs lm-eval for one run, unless `folder` already holds it. A stopped run resumes with the answers it has.

    Args:
        name: name of the run, for messages.
        run: everything that its results depend on, see `drllm.evaluation.eval_sh.plan`.
        folder: see `drllm.evaluation.eval_sh`.
        args: the command line of eval.sh; batch size, device and processes, on which results do not depend.

    Raises:
        UserError: lm-eval failed, the folder holds another run, or it cannot be written.
    """
    record = folder / "run.json"
    if _is_complete(record, run, args.overwrite):
        print(f"{name}: complete, kept ({folder})", flush=True)
        return
    for file in ("results.json", "queries.jsonl", "answers.db"):
        if (folder / file).is_dir():
            raise UserError(f"{folder / file} is a folder, but a file goes there; remove it or choose --output_dir")
    parts, log = folder / "parts", folder / "log.txt"
    started = time.monotonic()
    with disk_errors(folder, SAFE):
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        shutil.rmtree(parts, ignore_errors=True)
        log.write_text("")
        commands = [
            _launch_command(run, part, folder, parts / str(number), args) for number, part in enumerate(run["parts"])
        ]
        (folder / "command.txt").write_text(
            "".join(shlex.join(["python", *command[1:]]) + "\n" for command in commands)
        )
        for part, command in zip(run["parts"], commands, strict=True):
            print(f"{name}: running lm-eval on {part['tasks']} (log: {log})", flush=True)
            if status := launch(command, log):
                raise UserError(f"lm-eval ended with status {status}: {_reason(log)} (see {log}); {SAFE}")
        _collect(folder, [parts / str(number) for number in range(len(commands))])
    details = {"run": run, "seconds": round(time.monotonic() - started, 1), "batch_size": args.batch_size}
    code = {"versions": provenance.versions(), "commit": provenance.commit()}
    write_json(record, details | code)
    shutil.rmtree(parts, ignore_errors=True)
    for leftover in folder.glob("answers.db*"):
        leftover.unlink()


def _is_complete(record: Path, run: dict[str, Any], may_overwrite: bool) -> bool:
    """Whether `record` says that the same run is complete; UserError when it is another run, or damaged."""
    if not record.exists():
        return False
    fix = f"delete {record.parent} and run the same command again, or pass --overwrite"
    try:
        done = read_json(record, fix).get("run")
        if not isinstance(done, dict):
            raise UserError(f"{record}: the field 'run' is missing or not an object; {fix}")
    except UserError:
        if may_overwrite and record.is_file():
            return False
        raise
    if done == run:
        return True
    if not may_overwrite:
        fields = ", ".join(sorted(key for key in done.keys() | run.keys() if done.get(key) != run.get(key)))
        raise UserError(
            f"{record.parent} holds a run that differs in: {fields}; choose another --output_dir, or pass --overwrite"
        )
    return False


def _launch_command(
    run: dict[str, Any], part: dict[str, Any], folder: Path, part_folder: Path, args: argparse.Namespace
) -> list[str]:
    model_args = [f"pretrained={run['pretrained']}", f"dtype={run['dtype']}", run["model_args"]]
    model_args += [f"routing_log={part_folder / 'queries.jsonl'}"]
    model_args += ["enable_thinking=False"] if part.get("enable_thinking") is False else []
    options = {
        "--model_args": ",".join(part for part in model_args if part),
        "--tasks": part["tasks"],
        "--data_dir": args.data_dir and str(args.data_dir),
        "--response_format": json.dumps(part["response_format"]) if "response_format" in part else None,
        "--output_path": str(part_folder / "raw"),
        "--use_cache": str(folder / "answers.db"),
        "--batch_size": args.batch_size,
        "--device": args.device,
        "--num_fewshot": run["num_fewshot"],
        "--limit": run["limit"],
        "--gen_kwargs": part["gen_kwargs"],
    }
    command = [sys.executable, "-m", "drllm.evaluate"]
    if args.num_processes > 1:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(args.num_processes)]
        command += (["--cpu"] if args.device == "cpu" else []) + ["-m", "drllm.evaluate"]
    for flag, value in options.items():
        command += [] if value is None else [flag, str(value)]
    command += ["--log_samples"] + (["--apply_chat_template"] if part["chat_template"] else [])
    return command + (["--confirm_run_unsafe_code"] if args.unsafe_code else [])


def launch(command: list[str], log: Path) -> int:
    """Runs `command`, appends its output to `log`, returns its exit status. The process frees all its memory."""
    with log.open("a") as output:
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode


def _reason(log: Path) -> str:
    """The last error in a log, else its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")
    return reason.removeprefix("error: ")[:500]


def _collect(folder: Path, parts: list[Path]) -> None:
    """Merges what lm-eval wrote for each part into results.json, samples/ and queries.jsonl of the run."""
    fix = f"see {folder / 'log.txt'}, and run the same command to resume"
    merged: dict[str, Any] = {}
    samples = folder / "samples"
    shutil.rmtree(samples, ignore_errors=True)
    samples.mkdir()
    queries = []
    for part in parts:
        files = sorted(part.glob("raw/**/results_*.json"))
        if not files:
            raise UserError(f"lm-eval wrote no results below {part / 'raw'}; {fix}")
        results = read_json(files[-1], fix)
        for path in part.glob("raw/**/samples_*.jsonl"):
            task = path.stem.removeprefix("samples_").rpartition("_")[0]
            _check_samples(path, results.get("n-samples", {}).get(task, {}).get("effective"), fix)
            path.replace(samples / f"{task}.jsonl")
        queries.append((part / "queries.jsonl").read_text())
        merged = _merge(merged, results)
    (folder / "queries.jsonl").write_text("".join(queries))
    write_json(folder / "results.json", merged)


def _check_samples(path: Path, documents: int | None, fix: str) -> None:
    """Raises UserError when a samples file is cut off: lm-eval logs a full disk and carries on."""
    try:
        numbers = {json.loads(line)["doc_id"] for line in path.read_text().splitlines()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); {fix}") from None
    if documents is not None and len(numbers) != documents:
        raise UserError(f"{path} has {len(numbers)} of {documents} documents; {fix}")


def _merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Results of both; settings that are not per task are those of the first."""
    if not first:
        return second
    merged = {**second, **first}
    for key in PER_TASK:
        if key in first or key in second:
            merged[key] = first.get(key, {}) | second.get(key, {})
    counts = [results["config"].get("block_applications", {}) for results in (first, second)]
    merged["config"] = first["config"] | {"block_applications": counts[0] | counts[1]}
    return merged
