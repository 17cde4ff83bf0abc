"""Draws the picture of the method: a prompt, one router per block, and the path that all tokens then follow.

python docs/method_figure.py        # writes docs/method.png
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from drllm.paper.style import ACTION_COLOURS, ACTIONS, BLACK  # noqa: E402
from train_models.paths import path_to_layer_indices  # noqa: E402

PATH = (1, 0, 2, 1)
GREY, LIGHT, INK = "0.45", "0.965", BLACK
BLOCK_Y, ROUTER_Y = 1.55, 3.2  # centres of the two rows, in inches
FIRST_X, STEP = 3.5, 1.9


def box(axes: Axes, centre: tuple[float, float], size: tuple[float, float], text: str, **style) -> None:
    """A rounded box with text in its middle."""
    (x, y), (width, height) = centre, size
    options = {"facecolor": "white", "edgecolor": INK, "linewidth": 1.2} | style
    colour = options.pop("text_colour", INK)
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.09", **options))
    axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=11, linespacing=1.35)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style) -> None:
    """An arrow from `start` to `end`."""
    options = {"arrowstyle": "-|>", "mutation_scale": 13, "linewidth": 1.5, "color": INK, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, **(options | style)))


def draw(output: Path) -> None:
    """Draws `PATH` over four blocks into `output`."""
    width, height = 11.9, 4.15
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    box(axes, (1.15, BLOCK_Y), (1.8, 0.95), "prompt\n“What is 3 + 4?”", facecolor=LIGHT)
    about = "one small router per block\nreads the hidden states and\ndecides once per prompt"
    axes.text(0.25, ROUTER_Y, about, fontsize=11, va="center", linespacing=1.35)
    end = FIRST_X + len(PATH) * STEP
    for block, visits in enumerate(PATH):
        action, x = ACTIONS[visits], FIRST_X + block * STEP
        colours = {"facecolor": ACTION_COLOURS[action], "text_colour": "white" if action == "repeat" else INK}
        box(axes, (x, ROUTER_Y), (1.25, 0.6), f"{visits}  {action}", **colours)
        axes.text(x, ROUTER_Y + 0.45, f"router {block}", ha="center", fontsize=10, color=GREY)
        dashed = {"linestyle": (0, (4, 3)), "edgecolor": GREY, "text_colour": GREY} if action == "skip" else {}
        box(axes, (x, BLOCK_Y), (1.25, 0.95), f"block {block}\n(frozen)", **dashed)
        arrow(axes, (x, ROUTER_Y - 0.3), (x, BLOCK_Y + 0.48), color=GREY, linewidth=1.0)
        if action == "repeat":
            loop = {"connectionstyle": "arc3,rad=-0.75", "color": ACTION_COLOURS["repeat"], "linewidth": 2.0}
            arrow(axes, (x + 0.4, BLOCK_Y - 0.49), (x - 0.4, BLOCK_Y - 0.49), **loop)
    edges = (2.05, end - 0.55)
    ran = [FIRST_X + block * STEP for block, visits in enumerate(PATH) if visits]
    for left, right in pairwise([edges[0], *ran, None]):
        start = left if left == edges[0] else left + 0.63
        stop = edges[1] if right is None else right - 0.63
        bent = (
            {"connectionstyle": "arc3,rad=0.42", "color": ACTION_COLOURS["skip"], "linewidth": 2.0}
            if stop - start > STEP
            else {}
        )
        y = BLOCK_Y - 0.3 if bent else BLOCK_Y
        arrow(axes, (start, y), (stop, y), **bent)
    box(axes, (end - 0.05, BLOCK_Y), (1.0, 0.95), "answer\n“7”", facecolor=LIGHT)
    runs = ", ".join(str(index) for index in path_to_layer_indices(PATH))
    label = f"path {' '.join(map(str, PATH))}:  every token runs blocks {runs};  {sum(PATH)} block applications"
    axes.text(FIRST_X + 1.5 * STEP, 0.22, label, ha="center", va="center", fontsize=12, fontweight="bold")
    figure.savefig(output)


if __name__ == "__main__":
    draw(ROOT / "docs" / "method.png")
