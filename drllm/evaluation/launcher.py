"""lm-eval's command line with the model type `drllm`, which lm-eval cannot discover by itself."""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path

from drllm.errors import UserError

TASKS_FOLDER = Path(__file__).resolve().parents[2] / "eval_tasks"


def _take(arguments: list[str], flag: str) -> str | None:
    """Removes `flag VALUE` or `flag=VALUE` from `arguments` and returns the value, None when it is not there."""
    for place, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            del arguments[place]
            return argument.partition("=")[2]
        if argument == flag:
            if place + 1 == len(arguments):
                raise UserError(f"{flag} needs a value")
            value = arguments[place + 1]
            del arguments[place : place + 2]
            return value
    return None


def lm_eval_arguments(arguments: list[str]) -> list[str]:
    """Command-line arguments for lm-eval, from those of this launcher."""
    arguments = list(arguments)
    if arguments[:1] == ["run"]:
        del arguments[0]
    model = _take(arguments, "--model") or _take(arguments, "-M") or "drllm"
    model_args = []
    if "--model_args" in arguments:  # one or more values
        start = arguments.index("--model_args")
        end = next(
            (place for place in range(start + 1, len(arguments)) if arguments[place].startswith("-")), len(arguments)
        )
        model_args = arguments[start + 1 : end]
        del arguments[start:end]
    if model == "drllm" and (cache := _take(arguments, "--use_cache")) is not None:
        model_args.append(f"response_cache={cache}")
    given = {argument.split("=")[0] for argument in arguments}
    if model == "drllm" and not given & {"--batch_size", "-b", "--config", "-C"}:
        arguments += ["--batch_size", "8"]  # lm-eval's default is 1
    if (data_dir := _take(arguments, "--data_dir")) is not None:
        if not Path(data_dir).is_dir():
            raise UserError(f"--data_dir {data_dir} does not exist")
        arguments += ["--metadata", f"data_dir={data_dir}"]
    if not any(argument.split("=")[0] == "--include_path" for argument in arguments):
        arguments += ["--include_path", str(TASKS_FOLDER)]
    arguments += ["--model", model]
    return arguments + (["--model_args", ",".join(model_args)] if model_args else [])


def skip_catalogue(arguments: list[str]) -> None:
    """Keeps lm-eval from reading its thousands of task files (10 s and more) when only ours are asked for."""
    import lm_eval.tasks

    include = Path(arguments[arguments.index("--include_path") + 1]) if "--include_path" in arguments else None
    places = [n for n, part in enumerate(arguments) if part in ("--tasks", "-t")]
    if include != TASKS_FOLDER or len(places) != 1 or any(part.startswith("--tasks=") for part in arguments):
        return
    wanted = ",".join(itertools.takewhile(lambda part: not part.startswith("-"), arguments[places[0] + 1 :]))
    if not wanted:
        return
    ours = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    names = ours(include_path=str(TASKS_FOLDER)).all_tasks
    if all(name in names for name in wanted.split(",")):
        lm_eval.tasks.TaskManager = ours


def run_lm_eval(arguments: list[str]) -> None:
    """Runs lm-eval's command line with this launcher's `arguments`, in this process.

    Raises:
        UserError: an argument without its value, or a --data_dir that does not exist.
    """
    from lm_eval.__main__ import cli_evaluate

    import drllm.evaluation.lm_eval_model  # noqa: F401  (registers the model type)

    arguments = lm_eval_arguments(arguments)
    skip_catalogue(arguments)
    sys.argv = ["lm_eval", "run", *arguments]
    cli_evaluate()
