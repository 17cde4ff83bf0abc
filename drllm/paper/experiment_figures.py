"""Figures of the programs in experiments/ and benchmarks/, from the JSON that they write.

Figure 6: `draw_sweep`. Figure 5: `draw_ablation`. Figures 7 and 8: `draw_curves`.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from drllm.paper.style import (
    ACTION_COLOURS,
    ACTION_HATCHES,
    ACTIONS,
    BASE_COLOUR,
    BLACK,
    BLUE,
    ROUTER_COLOUR,
    SKY,
    label_categories,
    legend_below,
    new_figure,
    series,
)

PURE_ROUTER = -0.5  # the control knob at which routers decide alone
F1_NAMES = {"macro_f1": "macro", "f1_skip": "skip", "f1_execute": "execute", "f1_repeat": "repeat"}
CURVES = {"acc_skip": "skip accuracy", "acc_execute": "execute accuracy", "acc_repeat": "repeat accuracy"} | {
    "macro_f1": "macro F1"
}


def draw_sweep(sweep: Mapping[str, Any], path: Path) -> Path:
    """Figure 6: (a) accuracy against layers along the control knob p, (b) the routers' probabilities.

    Args:
        sweep: the JSON of experiments/sweep.py.
        path: PNG file to write.
    """
    points = sorted(sweep["points"], key=lambda point: point["routing_control"])
    layers = [point["blocks_per_query"] for point in points]
    accuracy = [100 * point["accuracy"] for point in points]
    with new_figure(path, (9, 3.6), columns=2, width_ratios=(5, 4)) as (_, axes):
        left, right = axes[0]
        error = [100 * point["accuracy_stderr"] for point in points]
        left.errorbar(layers, accuracy, yerr=error, color=BLUE, marker=".", lw=1, label="control knob p")
        base = sweep["base"]
        left.plot(base["blocks_per_query"], 100 * base["accuracy"], "*", ms=10, color=BASE_COLOUR, label="base model")
        for point in points:
            if point["routing_control"] == PURE_ROUTER:
                position = (point["blocks_per_query"], 100 * point["accuracy"])
                left.plot(*position, "s", ms=7, color=ROUTER_COLOUR, label="routers alone, p = -0.5")
        left.set(xlabel="layers per query", ylabel="accuracy (%)", title="(a) accuracy against layers")
        left.margins(0.17, 0.08)
        order = sorted(range(len(points)), key=lambda i: points[i]["routing_control"] != PURE_ROUTER)
        names = [f"p = {points[i]['routing_control']:g}" for i in order]
        _annotate_apart(left, [layers[i] for i in order], [accuracy[i] for i in order], names)
        left.legend()
        edges = np.array(sweep["probabilities"]["edges"])
        colours = ACTION_COLOURS | {"execute": BLACK}
        for action, line in zip(ACTIONS, ("-", ":", "--"), strict=True):
            right.stairs(sweep["probabilities"][action], edges, color=colours[action], ls=line, lw=1.6, label=action)
        right.set_yscale("symlog")
        right.set(xlabel="probability by a router", ylabel="decisions", title="(b) probabilities of the actions")
        right.legend(loc="upper center")
    return path


def _annotate_apart(axis: Axes, x: Sequence[float], y: Sequence[float], texts: Sequence[str]) -> None:
    """Writes each text beside its point, those left out that would overlap an earlier one."""
    axis.figure.draw_without_rendering()  # so that the limits are final
    taken: list[np.ndarray] = []
    for position, text in zip(zip(x, y, strict=True), texts, strict=True):
        here = axis.transAxes.inverted().transform(axis.transData.transform(position))
        if all(abs(here - other)[0] > 0.1 or abs(here - other)[1] > 0.05 for other in taken):
            axis.annotate(text, position, (-5, 4), textcoords="offset points", fontsize=7, ha="right")
            taken.append(here)


def draw_ablation(result: Mapping[str, Any], path: Path) -> Path:
    """Figure 5 and the other ablations: F1 scores, accuracy and layers of each setting, one column per panel.

    Args:
        result: the JSON of experiments/ablations.py; bars are means over seeds, with one standard deviation.
        path: PNG file to write.
    """
    panels: dict[str, list[dict]] = {}
    for row in result["summary"]:
        panels.setdefault(row["panel"], []).append(row)
    widths = [max(len(rows), 4) for rows in panels.values()]
    size = (1.6 + 0.75 * sum(widths), 6.4)
    options = {"width_ratios": widths, "sharex": "col", "sharey": "row"}
    with new_figure(path, size, rows=3, columns=len(panels), **options) as (figure, axes):
        for (top, middle, bottom), (panel, rows) in zip(axes.T, panels.items(), strict=True):
            for number, (name, label) in enumerate(F1_NAMES.items()):
                style = {"hatch": ACTION_HATCHES.get(label, ""), "label": f"F1 {label}"}
                colour = ACTION_COLOURS.get(label, "0.25")
                _bars(top, rows, name, colour, offset=(number - 1.5) * 0.2, width=0.2, **style)
            _bars(middle, rows, "accuracy", SKY, 100, digits=1)
            _bars(bottom, rows, "layers", SKY, digits=1)
            for axis, name, scale in ((middle, "base_accuracy", 100), (bottom, "base_layers", 1)):
                axis.axhline(scale * rows[0][name]["mean"], color=BASE_COLOUR, ls="--", lw=1, label="base model")
            for axis in (top, middle, bottom):
                axis.grid(False, axis="x")
            label_categories(bottom, [row["setting"].replace("_", " ") for row in rows])
            top.set_title(panel)
        top, middle, bottom = axes[:, 0]
        top.set(ylabel="F1 on held-out labels", ylim=(0, 1))
        middle.set_ylabel("accuracy (%)")
        bottom.set_ylabel("layers per forward pass")
        handles = [axis.get_legend_handles_labels() for axis in (top, middle)]
        bars, labels = (list(itertools.chain(*parts)) for parts in zip(*handles, strict=True))
        figure.legend(bars, labels, loc="outside lower center", ncols=5 if len(panels) > 1 else 3)
        figure.suptitle(f"Mean and standard deviation of {rows[0]['seeds']} seeds", fontsize=9)
    return path


def _bars(axis: Axes, rows: Sequence[Mapping], name: str, colour: str, scale: float = 1, **style) -> None:
    """One bar per setting with its standard deviation.

    Args:
        axis: axes that are drawn on.
        rows: rows of the ablation's summary.
        name: name of the number.
        colour: colour of the bars.
        scale: factor of the number.
        style: width and offset of the bars; digits: writes the value into each bar; more for `Axes.bar`.
    """
    width, offset, digits = style.pop("width", 0.6), style.pop("offset", 0), style.pop("digits", None)
    means = [scale * row[name]["mean"] for row in rows]
    style |= {"yerr": [scale * row[name]["std"] for row in rows], "error_kw": {"lw": 0.8}}
    x = np.arange(len(rows)) + offset
    axis.bar(x, means, width, color=colour, edgecolor="black", lw=0.4, **style)
    for position, mean in zip(x, means, strict=True) if digits is not None else ():
        axis.text(position, mean / 2, f"{mean:.{digits}f}", ha="center", va="center", fontsize=7)


def draw_curves(result: Mapping[str, Any], path: Path) -> Path | None:
    """Figures 7 and 8: accuracy of each class and macro F1 on held-out labels over training, one line per setting.

    Lines are means over seeds, bands one standard deviation.

    Args:
        result: the JSON of experiments/ablations.py. Runs without a history of training draw nothing.
        path: PNG file to write.

    Returns:
        `path`, None when nothing was drawn.
    """
    runs = [run for run in result["runs"] if run.get("history")]
    if not runs:
        return None
    panels = list(dict.fromkeys(run["panel"] for run in runs))
    names = [name for name in CURVES if all(name in entry for run in runs for entry in run["history"])]
    size = (1.2 + 2.5 * len(names), 2.7 * len(panels) + 0.3)
    with new_figure(path, size, rows=len(panels), columns=len(names)) as (_, axes):
        for row, panel in zip(axes, panels, strict=True):
            settings = dict.fromkeys(run["setting"] for run in runs if run["panel"] == panel)
            for number, setting in enumerate(settings):
                histories = [r["history"] for r in runs if (r["panel"], r["setting"]) == (panel, setting)]
                for axis, name in zip(row, names, strict=True):
                    epochs, means, deviations = zip(*_over_seeds(histories, name), strict=True)
                    style, low = series(number), np.subtract(means, deviations)
                    axis.plot(epochs, means, color=style.colour, ls=style.line, label=setting)
                    axis.fill_between(epochs, low, np.add(means, deviations), color=style.colour, alpha=0.12, lw=0)
            for axis, name in zip(row, names, strict=True):
                axis.set(title=CURVES[name], xlabel="epoch")
            row[0].set_ylabel("on held-out labels")
            row[-1].legend(title=panel, loc="center left", bbox_to_anchor=(1, 0.5))
    return path


def _over_seeds(histories: Sequence[Sequence[Mapping]], name: str) -> Iterator[tuple[float, float, float]]:
    """(epoch, mean, standard deviation) of a metric, for the epochs that all seeds have."""
    for entries in zip(*histories, strict=False):
        values = [entry[name] for entry in entries]
        yield entries[0]["epoch"], statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def draw_methods(result: Mapping[str, Any], path: Path) -> Path:
    """Accuracy against layers of several methods; error bars are 95% intervals of the paired difference from the base.

    The lengths of one method (static paths) are joined.

    Args:
        result: the JSON of extensions/baselines/compare.py.
        path: PNG file to write.
    """
    kinds: dict[str, list[dict]] = {}
    for row in result["rows"]:
        kinds.setdefault(row["method"].partition(":")[0], []).append(row)
    with new_figure(path, (6.4, 4.2)) as (figure, axes):
        axis, styles = axes[0][0], dict[str, dict[str, Any]]()
        for kind, rows in kinds.items():
            style = {"color": BASE_COLOUR, "marker": "*", "ms": 11}
            if kind != "base":
                method = kind.removeprefix("random decisions, at the rates of ")
                if method not in styles:  # random decisions look like the method whose rates they have, but hollow
                    styles[method] = series(len(styles)).points
                style = styles[method]
            errors = [(row["against_base"]["high"] - row["against_base"]["low"]) / 2 for row in rows]
            axis.errorbar(
                [row["layers"] for row in rows],
                [100 * row["accuracy"] for row in rows],
                errors,
                ls=":" if len(rows) > 1 else "none",
                lw=1,
                label=kind,
                markerfacecolor="white" if kind.startswith("random") else style["color"],
                **style,
            )
        axis.set(xlabel="layers per forward pass", ylabel="accuracy (%)")
        legend_below(figure, axis, columns=3)
    return path


def draw_latency(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Time saved against layers saved; the diagonal is a saving of as much time as layers.

    Args:
        rows: "rows" in the JSON of benchmarks/latency.py.
        path: PNG file to write.
    """
    cases: dict[str, list[Mapping]] = {}
    for row in rows:
        if "total_ratio" in row:
            cases.setdefault(f"batch {row['batch_size']}, {row['rows']}", []).append(row)
    with new_figure(path, (5.4, 4.2)) as (_, axes):
        axis = axes[0][0]
        for number, (case, members) in enumerate(cases.items()):
            members = sorted(members, key=lambda row: row["layers_saved"])
            x = [100 * row["layers_saved"] for row in members]
            y = [100 * (1 - row["total_ratio"]) for row in members]
            style = series(number)
            axis.plot(x, y, marker=style.marker, color=style.colour, ls=style.line, lw=1, label=case)
        axis.axline((0, 0), slope=1, color="0.5", lw=0.8)
        axis.axhline(0, color="0.5", lw=0.8)
        axis.set(xlabel="block applications saved (%)", ylabel="total time saved (%)")
        axis.legend()
    return path


def draw_search_concurrency(points: Sequence[Mapping[str, float]], path: Path) -> Path:
    """Throughput of the search against the number of questions that are searched at once.

    Args:
        points: measurements with questions_at_once and simulations_per_s, from benchmarks/search.py.
        path: PNG file to write.
    """
    with new_figure(path, (5, 3.2)) as (_, axes):
        axis = axes[0][0]
        x, y = ([point[name] for point in points] for name in ("questions_at_once", "simulations_per_s"))
        axis.plot(x, y, marker="o", color=BLUE)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(x, map(str, x))
        for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatted("{x:.0f}")
        axis.set(xlabel="questions searched at once", ylabel="simulations per second")
    return path


def draw_experiment(result: Mapping[str, Any], path: Path) -> list[Path]:
    """Draws the JSON of a program of experiments/ or benchmarks/ into `path`; nothing for results without a figure.

    An ablation whose runs have a history of training is drawn twice: the settings, and their curves in
    "{name}_curves.png".
    """
    if "ablation" in result:
        curves = draw_curves(result, path.with_name(f"{path.stem}_curves.png"))
        return [draw_ablation(result, path), *([curves] if curves else [])]
    if "points" in result and "probabilities" in result:
        return [draw_sweep(result, path)]
    rows = result.get("rows")
    if isinstance(rows, list) and rows:
        if "against_base" in rows[0]:
            return [draw_methods(result, path)]
        if sum(row.get("layers_saved", 0) > 0 and "total_ratio" in row for row in rows) > 1:
            return [draw_latency(rows, path)]
    figures = result.get("figures")
    if isinstance(figures, dict) and "questions_at_once" in next(iter(figures.get("points", [])), {}):
        return [draw_search_concurrency(figures["points"], path)]
    return []
