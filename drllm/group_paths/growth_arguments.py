"""The command-line arguments of `likelihood_paths.Growth`, which two programs share."""

from __future__ import annotations

import argparse
import math

from drllm.arguments import check_ranges
from drllm.group_paths.likelihood_paths import Growth


def add_growth_arguments(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds the arguments of `growth_of` but the price and the number of edits."""
    add = group.add_argument
    add("--pilot", type=int, default=40, help="questions per group on which every edit is tried")
    add("--keep", type=int, default=12, help="edits that are tried on more questions")
    add("--candidates", type=int, default=6, help="edits that a group tries at each further step")
    add("--finalists", type=int, default=3, help="edits that are measured on all questions of a group, at least")
    add("--caution", type=float, default=0.0, help="standard errors by which a gain must exceed its price")


def check_growth_arguments(arguments: argparse.Namespace) -> None:
    """UserError for an argument of `add_growth_arguments` out of range."""
    some = dict.fromkeys(("pilot", "keep", "candidates", "finalists"), (1, math.inf))
    check_ranges(arguments, **some, caution=(-math.inf, math.inf))


def growth_of(arguments: argparse.Namespace, max_edits: int) -> Growth:
    """How paths of groups are grown, as the arguments say."""
    names = ("pilot", "keep", "candidates", "finalists", "price", "caution")
    return Growth(max_edits=max_edits, **{name: getattr(arguments, name) for name in names})
