"""The command-line arguments of `likelihood_paths.Growth`, which two programs share."""

from __future__ import annotations

import argparse
import math

from drllm.arguments import check_ranges, parse_list
from drllm.group_paths.likelihood_paths import Growth


def add_growth_arguments(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds the arguments of `growth_of` but the price and the number of edits."""
    add = group.add_argument
    add("--pilot", type=int, default=40, help="questions per group on which every edit is tried")
    add("--keep", type=int, default=12, help="edits that are tried on more questions")
    add("--candidates", type=int, default=6, help="edits that a group tries at each further step")
    add("--finalists", type=int, default=3, help="edits that are measured on all questions of a group, at least")
    add("--further_prices", help="prices at which paths are grown, too, comma-separated; --price alone chooses")
    add("--nominees", type=int, default=3, help="paths off the chain that validation questions choose among")
    add("--caution", type=float, default=0.0, help="standard errors by which a gain must exceed its price")


def check_growth_arguments(arguments: argparse.Namespace) -> None:
    """UserError for an argument of `add_growth_arguments` out of range."""
    some = dict.fromkeys(("pilot", "keep", "candidates", "finalists"), (1, math.inf))
    check_ranges(arguments, **some, nominees=(0, math.inf), caution=(-math.inf, math.inf))
    _further_prices(arguments)


def growth_of(arguments: argparse.Namespace, max_edits: int) -> Growth:
    """How paths of groups are grown, as the arguments say."""
    names = ("pilot", "keep", "candidates", "finalists", "price", "caution", "nominees")
    values = {name: getattr(arguments, name) for name in names}
    return Growth(max_edits=max_edits, further_prices=_further_prices(arguments), **values)


def _further_prices(arguments: argparse.Namespace) -> tuple[float, ...]:
    if arguments.further_prices is None:
        return ()
    return tuple(parse_list("further_prices", arguments.further_prices, float, "0.004,0.008"))
