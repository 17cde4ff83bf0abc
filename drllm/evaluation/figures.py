"""Figures from results: accuracy against layers, decisions by block, labels by block, the control knob.

    python -m drllm.figures comparison results/NAME        figures 1, 4 and 10
    python -m drllm.figures labels data/                   figure 9
    python -m drllm.figures sweep results/NAME/sweep.json  figure 6

All are drawn to be read in black and white.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np

from drllm.errors import UserError, main_guard
from drllm.evaluation.runs import Run, in_domain_columns, load_runs, task_order

ACTIONS = ("skip", "execute", "repeat")
STYLE = {"skip": ("white", "///"), "execute": ("0.75", ""), "repeat": ("0.25", "")}


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, bbox_inches="tight")
    plt.close(figure)
    return path


def draw_accuracy(runs: list[Run], path: Path) -> Path:
    """Figure 1: accuracy against layers, an arrow from base to router for each group of tasks."""
    base = runs[0]
    columns = in_domain_columns(base) or {task: [task] for task in sorted(base.tasks, key=task_order)}
    figure, axes = plt.subplots(1, len(columns), figsize=(3.2 * len(columns), 3), squeeze=False)
    markers = ["o", "s", "^", "v", "D", "P"]
    for axis, (name, tasks) in zip(axes[0], columns.items(), strict=True):
        for run, marker in zip(runs, markers * len(runs), strict=False):
            accuracy, layers = run.accuracy(tasks), run.layers(tasks)
            if accuracy is None or layers is None:
                continue
            label = "+ " + run.name if run.name.startswith("router") else run.name
            axis.errorbar(
                layers.mean,
                100 * accuracy.mean,
                xerr=layers.stderr,
                yerr=100 * (accuracy.stderr or 0),
                fmt=marker,
                color="black",
                markerfacecolor="white" if run is base else "black",
                capsize=3,
                label=label,
            )
        axis.set_title(name)
        axis.set_xlabel("layers a query")
        axis.margins(0.25)
        axis.grid(color="0.9")
    axes[0][0].set_ylabel("accuracy (%)")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return _save(figure, path)


def _shares(run: Run) -> tuple[list[str], np.ndarray]:
    """(tasks, share [tasks, L, 3] of skip, execute and repeat) from the counted paths."""
    tasks = sorted(run.tasks, key=task_order)
    shares = []
    for task in tasks:
        found = run.results["config"]["block_applications"][task]["share_per_block"]
        shares.append(np.stack([np.array(found[action]) for action in ACTIONS], axis=-1))
    return tasks, np.stack(shares)


def draw_heatmap(run: Run, path: Path) -> Path:
    """Figures 4 and 10: for each block and task the share of queries that skip and that repeat it."""
    tasks, shares = _shares(run)
    blocks = shares.shape[1]
    figure, axes = plt.subplots(2, 1, figsize=(max(5, 0.32 * blocks + 2), 0.6 * len(tasks) + 2.2), sharex=True)
    for axis, action in zip(axes, (0, 2), strict=True):
        image = axis.imshow(100 * shares[:, :, action], cmap="Greys", vmin=0, vmax=100, aspect="auto")
        axis.set_yticks(range(len(tasks)), [task.removeprefix("drllm_") for task in tasks])
        axis.set_title(f"{ACTIONS[action]} (% of queries)", fontsize=10)
        for row in range(len(tasks)):
            for block in range(blocks):
                share = 100 * shares[row, block, action]
                if share >= 0.5:
                    colour = "white" if share > 50 else "black"
                    axis.text(block, row, f"{share:.0f}", ha="center", va="center", fontsize=6, color=colour)
        figure.colorbar(image, ax=axis, fraction=0.03, pad=0.02)
    axes[1].set_xlabel("block")
    axes[1].set_xticks(range(0, blocks, max(1, blocks // 16)))
    return _save(figure, path)


def _stacked_bars(axis, shares: np.ndarray) -> None:
    """Bars [blocks] of stacked percentages; `shares` is [blocks, 3]."""
    bottom = np.zeros(len(shares))
    for action, name in enumerate(ACTIONS):
        colour, hatch = STYLE[name]
        heights = 100 * shares[:, action]
        axis.bar(
            range(len(shares)), heights, bottom=bottom, color=colour, hatch=hatch, edgecolor="black", label=name, lw=0.5
        )
        bottom += heights
    axis.set_xlabel("block")
    axis.set_ylabel("% of queries")
    axis.set_ylim(0, 100)


def draw_labels(folder: Path, path: Path) -> Path:
    """Figure 9: how the labels of each block are distributed over skip, execute and repeat."""
    from drllm.labels import read_labels

    rows = read_labels(folder).rows
    paths = np.array([row["optimal_layer_config"] for row in rows])
    shares = np.stack([(paths == action).mean(0) for action in range(3)], axis=-1)
    counts = [(paths == action).sum() for action in range(3)]
    figure, axis = plt.subplots(figsize=(max(5, 0.28 * paths.shape[1] + 2), 3))
    _stacked_bars(axis, shares)
    axis.set_ylabel("% of labels")
    axis.set_title(
        f"{len(rows)} labels: " + ", ".join(f"{name} {count}" for name, count in zip(ACTIONS, counts, strict=True)),
        fontsize=10,
    )
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, path)


def draw_decisions(run: Run, path: Path) -> Path:
    """What the routers decided by block, over all queries."""
    tasks, shares = _shares(run)
    counted = run.results["config"]["block_applications"]
    weights = np.array([counted[task]["queries"] for task in tasks], dtype=float)
    figure, axis = plt.subplots(figsize=(max(5, 0.28 * shares.shape[1] + 2), 3))
    _stacked_bars(axis, np.einsum("t,tla->la", weights / weights.sum(), shares))
    axis.set_title("decisions of the routers", fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, path)


def draw_sweep(source: Path, path: Path) -> Path:
    """Figure 6: accuracy and layers against the control knob p, and the routers' probabilities."""
    try:
        sweep = json.loads(source.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{source} is no sweep of `python -m drllm.sweep` ({error})") from None
    points = sweep["points"]
    knob = [point["routing_control"] for point in points]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    accuracy = [100 * point["accuracy"] for point in points]
    error = [100 * point["accuracy_stderr"] for point in points]
    left.errorbar(knob, accuracy, yerr=error, color="black", marker="o", capsize=3, label="accuracy")
    left.axhline(100 * sweep["base"]["accuracy"], color="black", ls=":", label="base accuracy")
    left.set_xlabel("control knob p")
    left.set_ylabel("accuracy (%)")
    layers = left.twinx()
    layers.plot(knob, [point["blocks_per_query"] for point in points], color="0.5", marker="s", ls="--", label="layers")
    layers.set_ylabel("layers a query")
    handles = [handle for axis in (left, layers) for handle in axis.get_legend_handles_labels()[0]]
    left.legend(handles=handles, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=3)
    edges = np.array(sweep["probabilities"]["edges"])
    for name, line in zip(ACTIONS, ("-", "--", ":"), strict=True):
        right.stairs(np.array(sweep["probabilities"][name]), edges, color="black", ls=line, label=name)
    right.set_yscale("symlog")
    right.set_xlabel("probability by a router")
    right.set_ylabel("decisions")
    right.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return _save(figure, path)


def draw_comparison(folder: Path, output: Path) -> list[Path]:
    """The figures of eval.sh: accuracy against layers, and what the routers decided."""
    runs = load_runs(folder)
    return [
        draw_accuracy(runs, output / "accuracy_layers.png"),
        draw_heatmap(runs[1], output / "decisions_by_task.png"),
        draw_decisions(runs[1], output / "decisions.png"),
    ]


@main_guard
def main() -> None:
    """The command line; prints the paths of what was drawn."""
    parser = argparse.ArgumentParser(prog="python -m drllm.figures", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("comparison", "labels", "sweep"))
    parser.add_argument("source", type=Path, help="folder of eval.sh, folder of labels, or sweep.json")
    parser.add_argument("--output_dir", type=Path, default=None, help="default: figures/ beside the source")
    args = parser.parse_args()
    beside = args.source.parent if args.what == "sweep" else args.source
    output = args.output_dir or beside / "figures"
    if not args.source.exists():
        raise UserError(f"{args.source} does not exist")
    if args.what == "comparison":
        drawn = draw_comparison(args.source, output)
    elif args.what == "labels":
        drawn = [draw_labels(args.source, output / "labels.png")]
    else:
        drawn = [draw_sweep(args.source, output / "sweep.png")]
    for path in drawn:
        print(path)


if __name__ == "__main__":
    raise SystemExit(main())
