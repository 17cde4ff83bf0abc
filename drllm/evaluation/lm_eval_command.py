"""lm-eval's command line with the model type `drllm`, which lm-eval cannot discover by itself."""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drllm.arguments import check_device
from drllm.errors import UserError
from drllm.evaluation.protocol import canonical_gen_kwargs
from drllm.files import DISK_FULL, check_output_file, check_output_folder, disk_errors
from drllm.questions.response_format import ResponseFormat

TASKS_FOLDER = Path(__file__).resolve().parents[2] / "eval_tasks"


def _index(arguments: Sequence[str], *flags: str) -> int | None:
    """The position of the last of `flags`, as FLAG or FLAG=VALUE; None without one."""
    return next((n for n in reversed(range(len(arguments))) if arguments[n].split("=")[0] in flags), None)


def _take(arguments: list[str], *flags: str) -> str | None:
    """Removes the last `FLAG VALUE` or `FLAG=VALUE` of `arguments` and returns the value, None without one."""
    position = _index(arguments, *flags)
    if position is None:
        return None
    flag, equals, value = arguments.pop(position).partition("=")
    if equals:
        return value
    if position == len(arguments):
        raise UserError(f"{flag} needs a value")
    return arguments.pop(position)


def _take_list(arguments: list[str], flag: str) -> list[str]:
    """Removes `flag VALUE [VALUE ...]` or `flag=VALUE` and returns the values; empty without it."""
    position = _index(arguments, flag)
    if position is None:
        return []
    if "=" in arguments[position]:
        return [arguments.pop(position).partition("=")[2]]
    end = next((n for n in range(position + 1, len(arguments)) if arguments[n].startswith("-")), len(arguments))
    values = arguments[position + 1 : end]
    del arguments[position:end]
    if not values:
        raise UserError(f"{flag} needs a value")
    return values


def is_batch_size(value: str) -> bool:
    """Whether lm-eval accepts `value` as --batch_size: a positive integer, auto, or auto:N."""
    return bool(re.fullmatch(r"0*[1-9][0-9]*|auto(:0*[1-9][0-9]*)?", value))


def _check(arguments: Sequence[str]) -> None:
    """Checks arguments that lm-eval would use only after the model is loaded. UserError at the first bad one."""
    arguments = list(arguments)
    for flags in (("--batch_size", "-b"), ("--max_batch_size",)):
        size = _take(arguments, *flags)
        if size is not None and not (is_batch_size(size) and (flags[0] == "--batch_size" or size.isdigit())):
            expected = "a positive integer" + (", auto or auto:N" if flags[0] == "--batch_size" else "")
            raise UserError(f"{flags[0]} {size}: must be {expected}")
    if (seeds := _take(arguments, "--seed")) is not None:
        for seed in seeds.split(","):
            is_number = seed.strip().isascii() and seed.strip().isdigit()
            if seed.strip().lower() != "none" and not (is_number and int(seed) < 2**32):
                raise UserError(f"--seed {seeds}: must be integers from 0 to {2**32 - 1}, or None")
    if (limit := _take(arguments, "--limit", "-L")) is not None and not _is_positive(limit):
        raise UserError(f"--limit {limit}: must be a positive number")
    if (shots := _take(arguments, "--num_fewshot", "-f")) is not None and not (shots.isascii() and shots.isdigit()):
        raise UserError(f"--num_fewshot {shots}: must be an integer of at least 0")
    if (output := _take(arguments, "--output_path", "-o")) is not None:
        is_file = output.endswith((".json", ".jsonl"))
        (check_output_file if is_file else check_output_folder)(output, "--output_path")


def _check_model(arguments: Sequence[str]) -> None:
    """Raises UserError for lm-eval's `arguments` without a checkpoint or with a device that is not there."""
    ours = _index(arguments, "--model") is not None and arguments[_index(arguments, "--model") + 1] == "drllm"
    if ours and _index(arguments, "--config", "-C", "--help", "-h") is None:
        position = _index(arguments, "--model_args")
        if position is None or "pretrained" not in arguments[position + 1]:
            raise UserError("--model_args names no checkpoint; pass --model_args pretrained=CHECKPOINT")
        check_device(_take(list(arguments), "--device"))


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def lm_eval_arguments(arguments: list[str]) -> list[str]:
    """Command-line arguments for lm-eval, from those of this launcher.

    Raises:
        UserError: a bad argument; nothing is loaded yet.
    """
    arguments = list(arguments)
    if arguments[:1] == ["run"]:
        del arguments[0]
    _check(arguments)
    model = _take(arguments, "--model", "-M") or "drllm"
    model_args = _take_list(arguments, "--model_args") + _take_list(arguments, "-a")
    if model == "drllm" and (cache := _take(arguments, "--use_cache", "-c")) is not None:
        check_output_file(cache, "--use_cache")
        model_args.append(f"response_cache={cache}")
    if model == "drllm" and _index(arguments, "--batch_size", "-b", "--config", "-C") is None:
        arguments += ["--batch_size", "8"]  # lm-eval's default is 1
    if gen_kwargs := _take_list(arguments, "--gen_kwargs"):
        arguments += ["--gen_kwargs", *canonical_gen_kwargs(gen_kwargs)]
    metadata: dict[str, Any] = {}
    if (data_dir := _take(arguments, "--data_dir")) is not None:
        if not Path(data_dir).is_dir():
            raise UserError(f"--data_dir {data_dir} does not exist or is not a folder")
        metadata["data_dir"] = data_dir
    if (text := _take(arguments, "--response_format")) is not None:
        metadata["response_format"] = _response_format(text).as_dict()
    if metadata:
        arguments += ["--metadata", json.dumps(metadata)]
    if _index(arguments, "--include_path") is None:
        arguments += ["--include_path", str(TASKS_FOLDER)]
    arguments += ["--model", model]
    return arguments + (["--model_args", *_joined(model_args)] if model_args else [])


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


def skip_catalogue(arguments: list[str]) -> None:
    """Keeps lm-eval from reading its thousands of task files (10 s and more) when only ours are requested."""
    import lm_eval.tasks

    include = Path(arguments[arguments.index("--include_path") + 1]) if "--include_path" in arguments else None
    positions = [n for n, part in enumerate(arguments) if part in ("--tasks", "-t")]
    if include != TASKS_FOLDER or len(positions) != 1 or any(part.startswith("--tasks=") for part in arguments):
        return
    requested = ",".join(itertools.takewhile(lambda part: not part.startswith("-"), arguments[positions[0] + 1 :]))
    if not requested:
        return
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
