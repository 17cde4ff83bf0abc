"""Figures over questions: accuracy against layers (Figure 1), usage of layers (Figures 4 and 10), labels (Figure 9)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from drllm.evaluation.comparison_table import mean_over_sets
from drllm.evaluation.results import BASE, ROUTER, Estimate, Run, in_domain_columns, load_runs, task_name, task_order
from drllm.files import read_json, write_json
from drllm.labels import read_labels
from drllm.paper.numbers import paper_models, paper_sets, paper_table
from drllm.paper.result_files import Evaluated
from drllm.paper.style import (
    ACTION_COLOURS,
    ACTION_HATCHES,
    ACTIONS,
    BASE_COLOUR,
    BLUE,
    GREEN,
    ROUTER_COLOUR,
    USAGE_COLOURS,
    label_categories,
    legend_below,
    new_figure,
    series,
)

LABEL_COUNTS = "label_counts.json"
THIRDS = ("early", "middle", "late")


def short_name(task: str) -> str:
    """The paper's short name of an in-domain task, e.g. "D-1" for "drllm_dart_1"; other names as they are."""
    names = {task_name(name): printed for name, printed in paper_sets().items()}
    short = {"ARC-E": "A-1", "ARC-C": "A-2"}
    name = names.get(task, task)
    return short.get(name, name.replace("DART", "D"))


def _point(run: Run, tasks: Sequence[str]) -> tuple[Estimate, Estimate] | None:
    """(layers, accuracy), means over sets."""
    layers, accuracy = mean_over_sets(run.layers, tasks), mean_over_sets(run.accuracy, tasks)
    return None if layers is None or accuracy is None else (layers, accuracy)


def _arrow(axis: Axes, end: tuple[float, float], start: tuple[float, float], **style) -> None:
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "shrinkA": 0, "shrinkB": 4, "lw": 1} | style)


def draw_accuracy(runs: Sequence[Run], path: Path) -> Path:
    """Accuracy against layers of one evaluation, an arrow from base to each router; one panel per group of sets.

    Args:
        runs: the base run first; routers and static paths behind it.
        path: PNG file to write.
    """
    base = runs[0]
    columns = in_domain_columns(base) or {task: [task] for task in sorted(base.tasks, key=task_order)}
    with new_figure(path, (3.1 * len(columns) + 0.4, 3.2), columns=len(columns)) as (figure, axes):
        for axis, (name, tasks) in zip(axes[0], columns.items(), strict=True):
            points = [(run, _point(run, tasks)) for run in runs]
            for number, (run, point) in enumerate((run, point) for run, point in points if point is not None):
                layers, accuracy = point
                is_router = run.name.startswith(ROUTER)
                style = series(number)
                axis.errorbar(
                    layers.mean,
                    100 * accuracy.mean,
                    xerr=layers.stderr,
                    yerr=None if accuracy.stderr is None else 100 * accuracy.stderr,
                    fmt=style.marker,
                    color=BASE_COLOUR if run is base else style.colour if not is_router else ROUTER_COLOUR,
                    label="+ " + run.name if is_router else run.name,
                )
                if is_router and points[0][1] is not None:
                    start = (points[0][1][0].mean, 100 * points[0][1][1].mean)
                    _arrow(axis, (layers.mean, 100 * accuracy.mean), start, color=ROUTER_COLOUR)
            axis.set(title=name, xlabel="layers per query")
            axis.margins(0.2)
        axes[0][0].set_ylabel("accuracy (%)")
        legend_below(figure, axes[0][0])
    return path


def _mean_point(models: Iterable[Evaluated], group: str, row: str) -> tuple[float, float]:
    """(layers per query, accuracy in percent): the mean over models, of each over its checkpoints."""
    points = []
    for evaluated in models:
        tasks = in_domain_columns(evaluated.base)[group]
        estimates = [_point(run, tasks) for run in evaluated.runs(row)]
        points.append([statistics.mean(parts[i].mean for parts in estimates) for i in range(2)])
    layers, accuracy = np.mean(points, axis=0)
    return layers, 100 * accuracy


def _paper_mean_point(group: str, row: str) -> tuple[float, float]:
    """The same over the models of the paper's Table 3."""
    rows = [model[row] for model in paper_table(3).rows.values()]
    columns = (f"{group} Num Layers", f"{group} Accuracy")
    return tuple(statistics.mean(cells[column]["value"] for cells in rows) for column in columns)


def draw_figure1(models: Mapping[str, Evaluated], path: Path) -> Path:
    """Figure 1: accuracy against layers on ARC and DART, averaged over models; the paper's, from Table 3, below ours.

    Args:
        models: title -> an evaluation on both ARC and DART.
        path: PNG file to write.
    """
    rows = (BASE, "+ router")
    counts = (f"ours ({len(models)} model{'s' if len(models) > 1 else ''})", f"paper ({len(paper_models())} models)")
    with new_figure(path, (6.6, 5.6), rows=2, columns=2) as (figure, axes):
        for column, group in zip(axes.T, ("ARC", "DART"), strict=True):
            ours = [_mean_point(models.values(), group, row) for row in rows]
            paper = [_paper_mean_point(group, row) for row in rows]
            for axis, title, (base, routed) in zip(column, counts, (ours, paper), strict=True):
                _arrow(axis, routed, base, color=ROUTER_COLOUR, lw=1.4)
                axis.plot(*base, "o", color=BASE_COLOUR, label="base")
                axis.plot(*routed, "s", color=ROUTER_COLOUR, label="+ router")
                axis.set(title=f"{group}, {title}", xlabel="layers per query", ylabel="accuracy (%)")
                axis.margins(0.2)
        legend_below(figure, axes[0][0])
    return path


def usage(runs: Sequence[Run]) -> tuple[list[str], np.ndarray]:
    """(tasks, mean usage [tasks, L]): how often each layer runs per forward pass, 0 skip, 1 execute, 2 repeat.

    Args:
        runs: runs of one model's checkpoints on the same tasks; the mean over them is returned.
    """
    tasks = sorted(runs[0].tasks, key=task_order)
    usages = []
    for run in runs:
        shares = [run.share_per_block(task) for task in tasks]
        usages.append([np.array(share["execute"]) + 2 * np.array(share["repeat"]) for share in shares])
    return tasks, np.mean(usages, axis=0)


def draw_usage(models: Mapping[str, Sequence[Run]], path: Path) -> Path:
    """Figures 4a and 10: mean usage of each layer (0 to 2) by set; one panel per model.

    Args:
        models: title of the panel -> routed runs, one per checkpoint.
        path: PNG file to write.
    """
    usages = {name: usage(runs) for name, runs in models.items()}
    blocks = max(values.shape[1] for _, values in usages.values())
    heights = [0.28 * len(tasks) + 0.75 for tasks, _ in usages.values()]
    size = (max(5.5, 0.34 * blocks + 1.8), sum(heights) + 0.2)
    with new_figure(path, size, rows=len(usages), height_ratios=heights) as (figure, axes):
        for axis, (name, (tasks, values)) in zip(axes[:, 0], usages.items(), strict=True):
            image = axis.imshow(values, cmap=USAGE_COLOURS, vmin=0, vmax=2, aspect="auto")
            axis.set_yticks(range(len(tasks)), map(short_name, tasks))
            axis.set_xticks(range(0, values.shape[1], 1 if values.shape[1] <= 16 else 2))
            axis.set(title=name, xlabel="layer")
            axis.grid(False)
            for (row, block), value in np.ndenumerate(values):
                # Layers that every query executes are left blank, so that the others stand out.
                if abs(value - 1) >= 0.005:
                    colour = "white" if value < 1.2 else "black"
                    text = f"{value:.2f}".lstrip("0") or "0"
                    axis.text(block, row, text, ha="center", va="center", fontsize=6, color=colour)
        figure.colorbar(image, ax=axes[:, 0], label="mean usage: 0 skip, 1 execute, 2 repeat", fraction=0.03, pad=0.02)
    return path


def draw_usage_boxes(models: Mapping[str, Sequence[Run]], path: Path) -> Path:
    """Figures 4b and 4c: mean usage of the early, middle and late layers by set, one box per third of the layers.

    Args:
        models: title of the panel -> routed runs, one per checkpoint.
        path: PNG file to write.
    """
    colours = (GREEN, BLUE, ROUTER_COLOUR)
    with new_figure(path, (6.4, 2.6 * len(models) + 0.5), rows=len(models), sharey=True) as (figure, axes):
        for axis, (name, runs) in zip(axes[:, 0], models.items(), strict=True):
            tasks, values = usage(runs)
            for number, (third, part) in enumerate(zip(THIRDS, np.array_split(values, 3, axis=1), strict=True)):
                boxes = axis.boxplot(
                    part.T,
                    positions=np.arange(len(tasks)) + 0.26 * (number - 1),
                    widths=0.2,
                    patch_artist=True,
                    medianprops={"color": "black", "lw": 1.2},
                    flierprops={"marker": ".", "markersize": 3},
                )
                for box in boxes["boxes"]:
                    box.set(facecolor=to_rgba(colours[number], 0.5), hatch=("", "///", "...")[number])
                boxes["boxes"][0].set_label(f"{third} layers")
            axis.axhline(1, color="0.5", lw=0.8, ls=":")
            label_categories(axis, [short_name(task) for task in tasks])
            axis.set(title=name, ylabel="mean usage per layer")
        legend_below(figure, axes[0][0])
    return path


def write_label_counts(labels: Path, folder: Path) -> None:
    """Counts the labels of each set for Figure 9 and writes them into `folder`, which `read_label_counts` reads.

    Args:
        labels: folder of labels.
        folder: folder of eval.sh, of routers that these labels trained.

    Raises:
        UserError: `labels` holds no labels, or damaged ones.
    """
    write_json(folder / LABEL_COUNTS, count_labels(labels))


def count_labels(labels: Path) -> dict[str, list[int]]:
    """Set -> [skip, execute, repeat], how often the labels of a folder say each, over questions and layers."""
    counts: dict[str, np.ndarray] = {}
    for label in read_labels(labels).labels:
        counts.setdefault(label.set, np.zeros(3, int))
        counts[label.set] += np.bincount(label.path, minlength=3)
    return {name: count.tolist() for name, count in counts.items()}


def read_label_counts(folder: Path) -> dict[str, list[int]] | None:
    """What `write_label_counts` wrote into `folder`, None when it wrote nothing."""
    path = folder / LABEL_COUNTS
    return read_json(path, "run eval.sh with --labels again") if path.is_file() else None


def draw_labels(models: Mapping[str, Mapping[str, Sequence[int]]], path: Path) -> Path:
    """Figure 9: shares of skip, execute and repeat among the labels of each set; one panel per model.

    Args:
        models: title of the panel -> `count_labels` of its labels.
        path: PNG file to write.
    """
    with new_figure(path, (5.6, 2.6 * len(models) + 0.4), rows=len(models)) as (figure, axes):
        for axis, (name, counts) in zip(axes[:, 0], models.items(), strict=True):
            sets = sorted(counts, key=lambda name: task_order(task_name(name)))
            shares = np.array([100 * np.array(counts[name]) / sum(counts[name]) for name in sets])
            bottom = np.zeros(len(shares))
            for number, action in enumerate(ACTIONS):
                heights = shares[:, number]
                axis.bar(
                    range(len(shares)),
                    heights,
                    bottom=bottom,
                    color=ACTION_COLOURS[action],
                    hatch=ACTION_HATCHES[action],
                    edgecolor="black",
                    lw=0.5,
                    label=action,
                )
                for x, (height, start) in enumerate(zip(heights, bottom, strict=True)):
                    if height >= 4:
                        colour = "white" if action == "repeat" else "black"
                        box = {"facecolor": ACTION_COLOURS[action], "edgecolor": "none", "pad": 1}
                        axis.text(
                            x,
                            start + height / 2,
                            f"{height:.0f}",
                            ha="center",
                            va="center",
                            color=colour,
                            size=7,
                            bbox=box,
                        )
                bottom += heights
            label_categories(axis, [short_name(task_name(set_name)) for set_name in sets])
            axis.set(title=name, ylabel="labels (%)", ylim=(0, 100))
            axis.grid(False, axis="x")
        legend_below(figure, axes[0][0])
    return path


def base_model_name(run: Run) -> str:
    """The base model of a routed run: its Hub name, or the last two folders of a local path."""
    name = run.results["config"]["routing"].get("base_model_name") or "base model"
    return "/".join(Path(name).parts[-2:])


def draw_comparison(folder: Path, output: Path) -> list[Path]:
    """The figures of eval.sh for the runs in `folder`: accuracy against layers, usage of layers, labels if counted.

    Raises:
        UserError: `folder` has no complete runs.
    """
    runs = load_runs(folder)
    routers = [run for run in runs if run.name.startswith(ROUTER)]
    name = base_model_name(runs[1])
    drawn = [
        draw_accuracy(runs, output / "accuracy_layers.png"),
        draw_usage({name: routers}, output / "usage.png"),
        draw_usage_boxes({name: routers}, output / "usage_thirds.png"),
    ]
    if counts := read_label_counts(folder):
        drawn.append(draw_labels({name: counts}, output / "labels.png"))
    return drawn


def by_base_model(evaluations: Sequence[Evaluated]) -> dict[str, Evaluated]:
    """Title -> the last in-domain evaluation of each base model on both groups of sets, the paper's models first."""
    order = [model["paper"] for model in paper_models()]
    models: dict[str, Evaluated] = {}
    for evaluated in evaluations:
        if "Total" in in_domain_columns(evaluated.base):
            name = evaluated.model if evaluated.model in order else base_model_name(evaluated.routers[0])
            models[name] = evaluated
    return dict(sorted(models.items(), key=lambda item: (*order, item[0]).index(item[0])))


def draw_over_models(evaluations: Sequence[Evaluated], output: Path) -> list[Path]:
    """Figures 1, 4, 9 and 10 over the base models of `evaluations`, as far as there are in-domain runs and labels."""
    models = by_base_model(evaluations)
    if not models:
        return []
    routers = {name: evaluated.routers for name, evaluated in models.items()}
    drawn = [
        draw_figure1(models, output / "figure1.png"),
        draw_usage(routers, output / "figure4a_figure10.png"),
        draw_usage_boxes(routers, output / "figure4bc.png"),
    ]
    counts = {name: read_label_counts(evaluated.folder) for name, evaluated in models.items()}
    if counts := {name: count for name, count in counts.items() if count}:
        drawn.append(draw_labels(counts, output / "figure9.png"))
    return drawn
