"""Step 3 of 3: lm-eval with and without routing on one checkpoint, then the table and figures.

    ./eval.sh CHECKPOINT [--tasks drllm_arc,drllm_dart] [--data_dir DIR] [--output_dir results/NAME]
    ./eval.sh SEED_0 SEED_1 SEED_2 ...        # checkpoints of several seeds: the table adds their mean and spread

Writes one folder per run below --output_dir: "base", "router" (further checkpoints are "router-2", ..., every
`--path` is "path-..."):

    {run}/results.json        lm-eval's results, with block applications counted (config.block_applications)
    {run}/samples/            lm-eval's samples, one file per task
    {run}/queries.jsonl       blocks, forward passes and path of each query
    {run}/run.json            settings, digests of checkpoint and data, versions, commit, seconds
    {run}/command.txt, log.txt

and command.txt, labels_manifest.json, table.md, table.tex and figures/. A complete run with the same settings is
kept; a stopped run is resumed with the answers it already has. `drllm.evaluation.protocol` says which settings each
task gets.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from drllm.arguments import A_GPU, HelpFormatter, add_shared, check_device
from drllm.checkpoints import checkpoint_info
from drllm.errors import UserError, main_guard
from drllm.evaluation.lm_eval_command import is_batch_size
from drllm.evaluation.lm_eval_process import run_lm_eval
from drllm.evaluation.protocol import (
    AUTHORS_TASKS,
    GENERATION_TASKS,
    Protocol,
    authors_tasks,
    default_tasks,
    describe_parts,
    is_graded_here,
    parse_path,
    reward_of,
    reward_warning,
)
from drllm.evaluation.results import BASE, ROUTER
from drllm.files import check_output_folder, disk_errors, read_json
from drllm.labels import read_labels
from drllm.manifests import CHECKPOINT_MANIFEST
from drllm.provenance import parse_dtype
from drllm.questions.grading import GRADER_VERSION

ROOT = Path(__file__).resolve().parents[2]
ROUTING_RANGES = {"routing_control": (-1, 1), "num_windows": (1, 32)}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line of eval.sh."""
    parser = argparse.ArgumentParser(
        prog="eval.sh",
        description="lm-eval with and without routing, then the table.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", nargs="+", help="a routed checkpoint of train.py, or several of different seeds")
    add("--base", default=None, help="plain checkpoint for the baseline; default: CHECKPOINT with static routing")
    add("--base_results", default=None, help="--output_dir of an earlier eval.sh on this base: uses its baseline")
    add(
        "--tasks",
        default=None,
        help=f"lm-eval tasks and groups, comma-separated, {', '.join(AUTHORS_TASKS)} as well; default: "
        f"{GENERATION_TASKS}, or the log-likelihood tasks of the label sets for a checkpoint with a likelihood reward",
    )
    add_shared(parser, "data_dir", says="the Hub")
    add(
        "--output_dir",
        default=None,
        help="folder of the results (default: results/NAME, NAME that of the checkpoint's folder)",
    )
    add("--path", action="append", default=[], help="also run this static path, one digit per block; repeatable")
    add(
        "--chat_template",
        default="auto",
        help="auto: in-domain tasks as the labels were made (their response format, too), all other tasks without; on; "
        "off; or tasks, comma-separated, that get the chat template on top of auto",
    )
    add(
        "--gen_kwargs",
        default=None,
        help="generation settings of out-of-domain tasks, e.g. max_new_tokens=2048 (the paper's limit); default: "
        "those of lm-eval's tasks",
    )
    add(
        "--dart_max_new_tokens",
        type=int,
        default=None,
        help="limit on new tokens for DART; default: that of the labels",
    )
    add_shared(parser, "dtype", "auto", "that of the checkpoint")
    add("--batch_size", default="32", help="a number, auto or auto:N; results do not depend on it")
    add_shared(parser, "device", says=A_GPU)
    add("--num_processes", type=int, default=1, help="data-parallel processes on this machine")
    add("--num_fewshot", type=int, default=None, help="shots; default: the tasks' own")
    add("--limit", type=int, default=None, help="questions per task, for a quick trial")
    add("--model_args", default="", help="further lm-eval model arguments of the routed run, e.g. routing_control=-0.3")
    add("--labels", default=None, help="folder of labels: adds the figure of their distribution")
    add("--unsafe_code", action="store_true", help="allow tasks that run generated code (humaneval)")
    add("--overwrite", action="store_true", help="replace runs with other settings in --output_dir")
    return parser.parse_args(arguments)


def check_arguments(args: argparse.Namespace) -> None:
    """Checks everything that needs no model. Raises UserError at the first bad argument."""
    if not is_batch_size(args.batch_size):
        raise UserError(f"--batch_size {args.batch_size}: must be a positive integer, auto or auto:N")
    for name, least in (("num_processes", 1), ("num_fewshot", 0), ("limit", 1), ("dart_max_new_tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if args.dtype != "auto":
        parse_dtype(args.dtype)
    check_device(args.device)
    check_model_args(args.model_args)
    for name in ("data_dir", "labels", "base_results"):
        folder = getattr(args, name)
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"--{name} {folder} does not exist or is not a folder")
    if args.labels is not None:
        read_labels(args.labels)


def check_model_args(text: str) -> None:
    """Checks --model_args, which are used only after the base run. UserError at the first bad one."""
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--model_args {part}: expected KEY=VALUE pairs, comma-separated")
        if name in ROUTING_RANGES:
            least, most = ROUTING_RANGES[name]
            try:
                is_valid = least <= float(value) <= most
            except ValueError:
                is_valid = False
            if not is_valid:
                raise UserError(f"--model_args {part}: must be a number from {least} to {most}")


def _digest_of_files(folder: Path) -> str:
    """A digest of a folder's files by name, size and time of change, and of the content of small ones."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} ".encode())
            digest.update(path.read_bytes() if status.st_size < 1 << 24 else str(status.st_mtime_ns).encode())
    return digest.hexdigest()[:16]


def plan(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run name -> everything that its results depend on. Raises UserError for bad arguments."""
    checkpoints = [Path(checkpoint) for checkpoint in args.checkpoint]
    configs = [checkpoint_info(checkpoint, is_local=True).require_routers().fields for checkpoint in checkpoints]
    for path in args.path:
        parse_path(path, configs[0].get("num_hidden_layers"))
    if len({str(config.get("base_model_fingerprint")) for config in configs}) > 1:
        raise UserError(f"the checkpoints {', '.join(args.checkpoint)} have different base models; compare one by one")
    tasks = args.tasks or default_tasks(checkpoints[0])
    is_setting = args.chat_template in ("auto", "on", "off")
    names = () if is_setting else tuple(name for name in args.chat_template.split(",") if name)
    protocol = Protocol(
        chat_template="auto" if names else args.chat_template,
        chat_template_tasks=names,
        gen_kwargs=args.gen_kwargs,
        dart_max_new_tokens=args.dart_max_new_tokens,
    )
    common = {
        "tasks": tasks,
        "parts": [part.record for part in protocol.parts(tasks, checkpoints[0])],
        "reward": reward_of(checkpoints[0]).name,
        "data": None if args.data_dir is None else _digest_of_files(Path(args.data_dir)),
        "dtype": args.dtype,
        "num_fewshot": args.num_fewshot,
        "limit": args.limit,
    }
    if any(is_graded_here(name) for name in tasks.split(",")):
        common["grader_version"] = GRADER_VERSION
    routed, *further = (
        common | {"checkpoint": _digest_of_files(path), "pretrained": str(path)} for path in checkpoints
    )
    base = routed | {"model_args": "is_static_routing=True"}
    if args.base is not None:
        checkpoint_info(args.base)
        digest = _digest_of_files(Path(args.base)) if Path(args.base).is_dir() else args.base
        base = common | {"checkpoint": digest, "pretrained": args.base, "model_args": ""}
    runs = {BASE: base, ROUTER: routed | {"model_args": args.model_args}}
    for number, other in enumerate(further, start=2):
        runs[f"{ROUTER}-{number}"] = other | {"model_args": args.model_args}
    for path in args.path:
        runs[f"path-{path}"] = routed | {"model_args": f"path='{path}'"}
    return runs


def reuse_base(run: dict[str, Any], earlier: Path, folder: Path, fingerprint: str | None) -> dict[str, Any]:
    """Copies the baseline of an earlier eval.sh, so that checkpoints of one base model share it.

    Args:
        run: the baseline that `plan` asks for. The earlier one may be of another checkpoint.
        earlier: --output_dir of the earlier eval.sh.
        folder: where the copy goes; a baseline that is already there is kept.
        fingerprint: fingerprint of the base weights.

    Returns:
        The earlier baseline's record, which says what was run.

    Raises:
        UserError: the earlier baseline is incomplete, or has other settings, questions or base weights.
    """
    fix = "omit --base_results to run the baseline"
    source = earlier / BASE
    done = read_json(source / "run.json", fix).get("run")
    results = read_json(source / "results.json", fix)
    if not isinstance(done, dict) or not isinstance(results.get("config"), dict):
        raise UserError(f"{source} is not a complete run of eval.sh; {fix}")
    names = (run.keys() | done.keys()) - {"checkpoint", "pretrained"}
    if differing := sorted(name for name in names if run.get(name) != done.get(name)):
        raise UserError(f"--base_results {earlier}: its baseline differs in: {', '.join(differing)}; {fix}")
    if (weights := results["config"].get("model_fingerprint")) != fingerprint:
        raise UserError(f"--base_results {earlier}: its base weights are {weights}, here {fingerprint}; {fix}")
    if not (folder / "run.json").exists():
        copy = folder.with_name(f".{folder.name}")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        shutil.rmtree(folder, ignore_errors=True)
        copy.rename(folder)
    return done


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Runs lm-eval, then writes the table and the figures."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    check_arguments(args)
    output = Path(args.output_dir or ROOT / "results" / Path(args.checkpoint[0]).resolve().name)
    check_output_folder(output, "--output_dir")
    if args.tasks is not None:
        args.tasks, said = authors_tasks(args.tasks)
        args.chat_template, _ = authors_tasks(args.chat_template)
        print("".join(f"--tasks {sentence}\n" for sentence in said), end="")
    runs = plan(args)
    print("\n".join(describe_parts(runs[BASE]["parts"])), flush=True)
    for checkpoint in map(Path, args.checkpoint):
        if warning := reward_warning(checkpoint, runs[BASE]["tasks"]):
            print(warning, file=sys.stderr, flush=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if args.unsafe_code:  # the Hub's metric of humaneval requires this consent
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        (output / "command.txt").write_text(shlex.join(["./eval.sh", *argv]) + "\n")
        manifest = Path(args.checkpoint[0]) / CHECKPOINT_MANIFEST
        if manifest.is_file():
            shutil.copyfile(manifest, output / manifest.name)
        if args.base_results is not None:
            weights = checkpoint_info(args.checkpoint[0]).fields.get("base_model_fingerprint")
            runs[BASE] = reuse_base(runs[BASE], Path(args.base_results), output / BASE, weights)
    for name, run in runs.items():
        run_lm_eval(name, run, output / name, args)
    from drllm.evaluation.comparison_table import write_comparison
    from drllm.paper.figures import draw_comparison, write_label_counts

    with disk_errors(output, "the runs are kept"):
        print("\n" + write_comparison(output))
        if args.labels is not None:
            write_label_counts(Path(args.labels), output)
        drawn = draw_comparison(output, output / "figures")
    print("\ntable:   " + str(output / "table.md"))
    for path in drawn:
        print(f"figure:  {path}")


if __name__ == "__main__":
    raise SystemExit(main())
