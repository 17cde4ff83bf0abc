"""lm-eval's command line with the model type `drllm`, which lm-eval cannot discover by itself."""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from drllm.arguments import MAX_SEED, check_device
from drllm.errors import UserError
from drllm.evaluation.protocol import canonical_gen_kwargs
from drllm.files import DISK_FULL, check_output_file, check_output_folder, disk_errors
from drllm.questions.response_format import ResponseFormat

TASKS_FOLDER = Path(__file__).resolve().parents[2] / "eval_tasks"


def _parser() -> argparse.ArgumentParser:
    """The arguments of lm-eval that are checked or changed here, and our own; all others are passed on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add = parser.add_argument
    add("--model", "-M", default="drllm")
    for flags in (("--model_args", "-a"), ("--gen_kwargs",)):
        add(*flags, nargs="+", action="extend", default=[])
    for flags in (("--use_cache", "-c"), ("--batch_size", "-b"), ("--max_batch_size",), ("--seed",), ("--limit", "-L")):
        add(*flags)
    for flags in (("--num_fewshot", "-f"), ("--output_path", "-o"), ("--device",), ("--include_path",)):
        add(*flags)
    add("--data_dir")  # ours, like the next
    add("--response_format")
    return parser


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    try:
        return _parser().parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{(error.argument_name or '').split('/')[0]} needs a value") from None


def is_batch_size(value: str) -> bool:
    """Whether lm-eval accepts `value` as --batch_size: a positive integer, auto, or auto:N."""
    return bool(re.fullmatch(r"0*[1-9][0-9]*|auto(:0*[1-9][0-9]*)?", value))


def _check(args: argparse.Namespace) -> None:
    """Checks arguments that lm-eval would use only after the model is loaded. UserError at the first bad one."""
    if args.batch_size is not None and not is_batch_size(args.batch_size):
        raise UserError(f"--batch_size {args.batch_size}: must be a positive integer, auto or auto:N")
    if (size := args.max_batch_size) is not None and not (size.isdigit() and is_batch_size(size)):
        raise UserError(f"--max_batch_size {size}: must be a positive integer")
    for seed in (args.seed or "none").split(","):
        is_number = seed.strip().isascii() and seed.strip().isdigit()
        if seed.strip().lower() != "none" and not (is_number and int(seed) <= MAX_SEED):
            raise UserError(f"--seed {args.seed}: must be integers from 0 to {MAX_SEED}, or None")
    if args.limit is not None and not _is_positive(args.limit):
        raise UserError(f"--limit {args.limit}: must be a positive number")
    if (shots := args.num_fewshot) is not None and not (shots.isascii() and shots.isdigit()):
        raise UserError(f"--num_fewshot {shots}: must be an integer of at least 0")
    if (output := args.output_path) is not None:
        is_file = output.endswith((".json", ".jsonl"))
        (check_output_file if is_file else check_output_folder)(output, "--output_path")
    if args.data_dir is not None and not Path(args.data_dir).is_dir():
        raise UserError(f"--data_dir {args.data_dir} does not exist or is not a folder")


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def lm_eval_arguments(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments for lm-eval, from those of this program.

    Raises:
        UserError: a bad argument; nothing is loaded yet.
    """
    args, passed_on = _parse(arguments[1:] if arguments[:1] == ["run"] else arguments)
    _check(args)
    given = dict(vars(args))
    model_args, gen_kwargs = given.pop("model_args"), canonical_gen_kwargs(given.pop("gen_kwargs"))
    metadata = {name: value for name in ("data_dir", "response_format") if (value := given.pop(name)) is not None}
    if "response_format" in metadata:
        metadata["response_format"] = _response_format(args.response_format).as_dict()
    if args.model == "drllm" and args.use_cache is not None:
        check_output_file(args.use_cache, "--use_cache")
        model_args.append(f"response_cache={given.pop('use_cache')}")
    if _is_ours(args, passed_on):
        given["batch_size"] = args.batch_size or "8"  # lm-eval's default is 1
    given["include_path"] = args.include_path or str(TASKS_FOLDER)
    given["model"] = given.pop("model")  # last, as before --model_args
    if metadata:
        given = {"metadata": json.dumps(metadata)} | given
    result = [*passed_on, *(["--gen_kwargs", *gen_kwargs] if gen_kwargs else [])]
    for name, value in given.items():
        result += [] if value is None else [f"--{name}", value]
    return result + (["--model_args", *_joined(model_args)] if model_args else [])


def _is_ours(args: argparse.Namespace, passed_on: Sequence[str]) -> bool:
    """Whether lm-eval gets the model type `drllm`, and no file that may say otherwise."""
    return args.model == "drllm" and not {"--config", "-C"} & {part.partition("=")[0] for part in passed_on}


def _check_model(arguments: Sequence[str]) -> None:
    """Raises UserError for lm-eval's `arguments` without a checkpoint or with a device that is not there."""
    args, passed_on = _parse(arguments)
    if _is_ours(args, passed_on) and not {"--help", "-h"} & set(passed_on):
        if not any("pretrained" in part for part in args.model_args):
            raise UserError("--model_args names no checkpoint; pass --model_args pretrained=CHECKPOINT")
        check_device(args.device)


def _response_format(text: str) -> ResponseFormat:
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise UserError(
            f"--response_format {text}: must be a JSON object, e.g. " + '{"max_new_tokens": {"dart-1": 20}}'
        )
    try:
        return ResponseFormat.of_dict(fields)
    except UserError as error:
        raise UserError(f"--response_format: {error}") from None


def _joined(model_args: list[str]) -> list[str]:
    # lm-eval reads one JSON object, or KEY=VALUE texts; an object stands alone.
    if model_args[0].lstrip().startswith("{"):
        if len(model_args) > 1:
            raise UserError(
                "--model_args as JSON cannot be combined with --use_cache; add response_cache to the object"
            )
        return model_args
    return [",".join(model_args)]


def skip_catalogue(arguments: Sequence[str]) -> None:
    """Keeps lm-eval from reading its thousands of task files (10 s and more) when only ours are requested."""
    import lm_eval.tasks

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tasks", "-t", nargs="+", action="append", default=[])
    parser.add_argument("--include_path", type=Path)
    args, _ = parser.parse_known_args(arguments)
    if args.include_path != TASKS_FOLDER or len(args.tasks) != 1:
        return
    requested = ",".join(args.tasks[0])
    ours = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    names = ours(include_path=str(TASKS_FOLDER)).all_tasks
    if all(name in names for name in requested.split(",")):
        lm_eval.tasks.TaskManager = ours


def run_lm_eval(arguments: list[str]) -> None:
    """Runs lm-eval's command line with this launcher's `arguments`, in this process.

    Raises:
        UserError: a bad argument, or a full disk.
    """
    arguments = lm_eval_arguments(arguments)
    _check_model(arguments)
    from lm_eval.__main__ import cli_evaluate

    import drllm.evaluation.lm_eval_model  # noqa: F401  (registers the model type)

    skip_catalogue(arguments)
    sys.argv = ["lm_eval", "run", *arguments]
    try:
        cli_evaluate()
    except ValueError as error:
        if str(error).startswith("Tasks not found"):
            raise UserError(f"--tasks: lm-eval has no task {str(error).partition(': ')[2]}") from None
        raise
    except OSError as error:
        if error.errno in DISK_FULL:
            with disk_errors(Path(error.filename or "the results"), "the answers so far are kept"):
                raise
        raise
