"""One style for all figures: colours that colour-blind readers tell apart and that differ in lightness.

The colours are from the palette of Okabe and Ito. Series differ in marker and line style, too, and bars of actions in
hatching, so every figure can also be read in grey.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ACTIONS = ("skip", "execute", "repeat")
# Lightness L* of 71, 92 and 46.
ACTION_COLOURS = {"skip": "#E69F00", "execute": "#E8E8E8", "repeat": "#0072B2"}
ACTION_HATCHES = {"skip": "///", "execute": "", "repeat": ""}
USAGE_COLOURS = "viridis"  # lightness rises evenly from 0 (skip) to 2 (repeat)

BLACK, BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)
BASE_COLOUR, ROUTER_COLOUR = BLACK, VERMILLION

_RC = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "hatch.linewidth": 0.6,
    "errorbar.capsize": 2,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "savefig.dpi": 160,
}


@dataclass(frozen=True)
class Series:
    """How one series of points or bars is drawn."""

    colour: str
    marker: str
    line: str

    @property
    def points(self) -> dict[str, str]:
        """Arguments of `Axes.errorbar` and `Axes.plot`, line style left out."""
        return {"color": self.colour, "marker": self.marker}


_CYCLE = (
    Series(BLUE, "o", "-"),
    Series(VERMILLION, "s", "--"),
    Series(GREEN, "^", "-."),
    Series(ORANGE, "D", ":"),
    Series(PURPLE, "v", (0, (5, 1))),
    Series(SKY, "P", (0, (3, 1, 1, 1))),
    Series(BLACK, "X", (0, (1, 1))),
)


def series(number: int) -> Series:
    """The style of series `number`, counted from 0; styles repeat after seven."""
    return _CYCLE[number % len(_CYCLE)]


@contextlib.contextmanager
def new_figure(
    path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1, **options
) -> Iterator[tuple[Figure, np.ndarray]]:
    """A figure of `size` inches with a grid of axes [rows, columns]; written to `path` when the block ends.

    Args:
        path: PNG file; missing folders are created.
        size: width and height in inches.
        rows, columns: size of the grid.
        options: further arguments of `Figure.subplots`, e.g. sharey.
    """
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight")


def legend_below(figure: Figure, axis: Axes, columns: int = 4) -> None:
    """The legend of `axis` below the whole figure, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))


def label_categories(axis: Axes, labels: Sequence[str]) -> None:
    """Ticks 0, 1, ... with `labels`, long ones on several lines."""
    lines = [textwrap.fill(label, 13, break_long_words=False) for label in labels]
    axis.set_xticks(range(len(labels)), lines)
