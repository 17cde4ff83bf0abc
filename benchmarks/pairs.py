"""Ratios of speed from runs that take turns, and when they are worth nothing.

Both sides of a ratio run in turn, in alternating order, with the same number of threads. The ratio is the median of the
ratios of the pairs, so that a machine whose speed changes slows both sides. A ratio is called unusable when there are
too few pairs or when the runs of one side differ too much among themselves.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from drllm.errors import UserError

LEAST_PAIRS = 5
MOST_SPREAD = 0.2  # interquartile range over median, of either side and of the ratios


@dataclass(frozen=True)
class Pairs:
    """Times of two sides that took turns.

    Attributes:
        reference: seconds per unit of work, one value per pair.
        ours: the same of the other side.
        load: load average over one minute when the measurement began, per CPU core; None where unknown.
    """

    reference: tuple[float, ...]
    ours: tuple[float, ...]
    load: float | None = None

    @property
    def ratios(self) -> tuple[float, ...]:
        """Reference over ours, one value per pair: above 1 means that ours is faster."""
        return tuple(theirs / ours for theirs, ours in zip(self.reference, self.ours, strict=True))

    @property
    def ratio(self) -> float:
        """The median of `ratios`."""
        return statistics.median(self.ratios)

    def problems(self) -> list[str]:
        """Why the ratio must not be reported, as clauses; empty when it is usable."""
        problems = []
        if len(self.ratios) < LEAST_PAIRS:
            problems.append(f"only {len(self.ratios)} pairs, at least {LEAST_PAIRS} are needed")
        for name, values in (("reference", self.reference), ("ours", self.ours), ("ratio", self.ratios)):
            if (width := spread(values)) > MOST_SPREAD:
                problems.append(
                    f"the spread of {name} is {width:.0%} of its median, at most {MOST_SPREAD:.0%} is usable"
                )
        return problems

    def __str__(self) -> str:
        text = f"{self.ratio:.2f}x (pairs {min(self.ratios):.2f} to {max(self.ratios):.2f})"
        problems = self.problems()
        return text if not problems else f"{text}  UNUSABLE: {'; '.join(problems)}"

    def record(self) -> dict[str, Any]:
        """Plain values for a result file."""
        return {
            "reference_seconds": list(self.reference),
            "seconds": list(self.ours),
            "ratio": self.ratio,
            "ratios": list(self.ratios),
            "spread": {"reference": spread(self.reference), "ours": spread(self.ours), "ratio": spread(self.ratios)},
            "load_per_core_before": self.load,
            "problems": self.problems(),
        }


def spread(values: tuple[float, ...] | list[float]) -> float:
    """Interquartile range over median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return (upper - lower) / statistics.median(values)


def rounds(sides: dict[str, Callable[[], float]], count: int, title: str, warm_up: bool = True) -> Iterator[dict]:
    """Runs all sides `count` times in turn, in an order that turns from round to round.

    Args:
        sides: name -> runs the side and returns its seconds.
        count: number of rounds.
        title: title of the progress bar.
        warm_up: runs one more round first, whose times are dropped.

    Yields:
        After each round name -> seconds of all rounds so far.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in tqdm(range(0 if warm_up else 1, count + 1), desc=title, unit="round"):
        for name in sorted(sides, reverse=number % 2 == 0):
            seconds = sides[name]()
            if number:
                times[name].append(seconds)
        if number:
            yield times


def run_pairs(
    reference: Callable[[], float], ours: Callable[[], float], pairs: int, title: str, warm_up: bool = True
) -> Pairs:
    """`rounds` of two sides, whose seconds are per unit of work."""
    load, times = load_per_core(), {}
    for times in rounds({"reference": reference, "ours": ours}, pairs, title, warm_up):  # noqa: B007
        pass
    return Pairs(tuple(times["reference"]), tuple(times["ours"]), load)


def load_per_core() -> float | None:
    """Load average of the last minute over the number of usable CPU cores; None where the system has none."""
    return os.getloadavg()[0] / usable_cores() if hasattr(os, "getloadavg") else None


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Runs its block with `count` threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def parse_threads(text: str) -> list[int]:
    """The comma-separated thread counts of `--threads`. UserError for counts that this machine does not have."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--threads {text}: expected comma-separated numbers, e.g. 1,2") from None
    if wrong := [count for count in counts if not 1 <= count <= usable_cores()]:
        raise UserError(f"--threads {wrong[0]}: this machine has {usable_cores()} usable CPU cores")
    return counts
