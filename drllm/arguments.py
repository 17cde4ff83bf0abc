"""Checks of command-line arguments that run before anything is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

import torch

from drllm.errors import UserError

MAX_SEED = 2**32 - 1  # of numpy
Number = TypeVar("Number", int, float)


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
        name: of the argument.
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
