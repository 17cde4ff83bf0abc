"""Command-line arguments: those that many programs share, and checks that run before anything is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from drllm.errors import UserError

MAX_SEED = 2**32 - 1  # the largest that numpy takes
Number = TypeVar("Number", int, float)

# What many programs take: name -> (help text, type).
SHARED: dict[str, tuple[str, Callable[[str], Any]]] = {
    "model": ("folder or Hub name of the base model", str),
    "revision": ("revision of the model on the Hub", str),
    "dtype": ("dtype of the base model's weights, e.g. bfloat16 or float32", str),
    "device": ("cpu, cuda, cuda:0, ...", str),
    "data_dir": ("folder of question files in the Hub's schema", Path),
    "dataset": ("question sets and groups, comma-separated", str),
    "unlike": ("sets, comma-separated: no question that nearly repeats one of their test questions", str),
    "reward": ("what counts as a right answer", str),
    "batch_size": ("questions per forward pass; results do not depend on it", int),
    "seed": ("seed for everything that is drawn", int),
    "work_dir": ("folder that keeps what was measured, so that a stopped run is resumed", Path),
    "output": ("JSON file of the result", Path),
}
A_GPU = "a GPU if there is one"


def add_shared(
    parser: argparse.ArgumentParser, name: str, default: Any = None, says: str | None = None, **options: Any
) -> None:
    """Adds --`name` of `SHARED`.

    Args:
        default: its default.
        says: words for the default in the help text; None: the default itself.
        options: further options of `add_argument`; `about` is appended to the help text.
    """
    text, kind = SHARED[name]
    text += options.pop("about", "")
    words = says if says is not None else default
    if words not in (None, ""):
        text += f" (default: {words})"
    parser.add_argument(f"--{name}", **{"type": kind, "default": default, "help": text} | options)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a help text that does not name it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        names_default = "(default: " in (action.help or "") or action.default in (None, [], "")
        return action.help if names_default else super()._get_help_string(action)


def check_ranges(arguments: argparse.Namespace, **ranges: tuple[float, float]) -> None:
    """Checks that numeric arguments lie within limits, both included.

    Args:
        arguments: as parsed; values of None are not checked.
        ranges: argument name -> (lowest, highest), with `math.inf` for no limit.

    Raises:
        UserError: names the first argument outside its range.
    """
    for name, (lowest, highest) in ranges.items():
        value = getattr(arguments, name)
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is None or lowest <= number <= highest:
                continue
            bound = f"at least {lowest:g}" if highest == math.inf else f"between {lowest:g} and {highest:.10g}"
            if (lowest, highest) == (-math.inf, math.inf):
                bound = "a number"  # and not NaN
            raise UserError(f"--{name} is {number}; it must be {bound}")


def parse_list(name: str, text: str, of: Callable[[str], Number], example: str) -> list[Number]:
    """The comma-separated numbers of an argument.

    Args:
        name: name of the argument.
        text: what the user gave.
        of: `int` or `float`.
        example: shown in the error message.

    Raises:
        UserError: not a number, or no number at all.
    """
    try:
        return [of(part) for part in text.split(",")]
    except ValueError:
        kind = "whole numbers" if of is int else "numbers"
        raise UserError(f"--{name} {text}: expected comma-separated {kind}, e.g. --{name}={example}") from None


def check_device(name: str | None) -> None:
    """Checks that the device of --device exists; None is not checked.

    Raises:
        UserError: not a device's name, or a GPU that this machine does not have.
    """
    if name is None:
        return
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # by torch: an unknown name, no CUDA, no such GPU
        raise UserError(f"--device {name} is not a device of this machine; e.g. cpu, cuda or cuda:0") from None
