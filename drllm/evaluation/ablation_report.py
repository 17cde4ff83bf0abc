"""Summary, table and figure of an ablation over several seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

ROUTER_METRICS = ("macro_f1", "f1_skip", "f1_execute", "f1_repeat")
# Columns of the table: title, name in the summary, factor, digits.
COLUMNS = (
    ("macro F1", "macro_f1", 1, 3),
    ("F1 skip", "f1_skip", 1, 3),
    ("F1 repeat", "f1_repeat", 1, 3),
    ("accuracy %", "accuracy", 100, 1),
    ("layers", "layers", 1, 2),
)


def summarise(runs: Sequence[dict]) -> list[dict]:
    """Mean and standard deviation over seeds of every number, one row per setting."""
    groups = defaultdict(list)
    for run in runs:
        groups[run["panel"], run["setting"]].append(run)
    summary = []
    for (panel, setting), members in groups.items():
        row = {"panel": panel, "setting": setting, "seeds": len(members)}
        for name, value in members[0].items():
            if name != "seed" and isinstance(value, int | float):
                values = [float(member[name]) for member in members]
                row[name] = {
                    "mean": statistics.mean(values),
                    "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                }
        summary.append(row)
    return summary


def ablation_table(result: dict) -> str:
    """The summary as text, mean ± standard deviation over seeds."""
    lines = [f"{'setting':34}" + "".join(f"{title:>14}" for title, *_ in COLUMNS)]
    panel = None
    for row in result["summary"]:
        if row["panel"] != panel:
            panel = row["panel"]
            lines.append(panel)
        cells = [
            f"{scale * row[name]['mean']:.{digits}f} ± {scale * row[name]['std']:.{digits}f}"
            for _, name, scale, digits in COLUMNS
        ]
        lines.append(f"  {row['setting']:32}" + "".join(f"{cell:>14}" for cell in cells))
    first = result["summary"][0]
    lines.append(
        f"base model: accuracy {100 * first['base_accuracy']['mean']:.1f}%, {first['base_layers']['mean']:.0f} layers; "
        f"{result['test_questions']} test questions, {first['seeds']} seeds"
    )
    return "\n".join(lines)


def draw_ablation(result: dict, path: Path) -> None:
    """One column per panel: F1 scores above, accuracy and layers of the routed model below, bars of one deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(row["panel"] for row in result["summary"]))
    figure, axes = plt.subplots(2, len(panels), figsize=(1.5 + 4 * len(panels), 6), squeeze=False)
    for column, panel in enumerate(panels):
        rows = [row for row in result["summary"] if row["panel"] == panel]
        x = list(range(len(rows)))

        def curve(axis, name: str, label: str, scale: float = 1.0, rows=rows, x=x, **style):
            means = [scale * row[name]["mean"] for row in rows]
            deviations = [scale * row[name]["std"] for row in rows]
            return axis.errorbar(x, means, deviations, label=label, marker="o", capsize=3, **style)

        top, bottom = axes[0][column], axes[1][column]
        for name in ROUTER_METRICS:
            curve(top, name, name, linewidth=2 if name == "macro_f1" else 1)
        top.set_ylim(0, 1)
        top.set_ylabel("F1 on held-out questions")
        curve(bottom, "accuracy", "accuracy", 100, color="tab:blue")
        base = 100 * rows[0]["base_accuracy"]["mean"]
        bottom.axhline(base, color="tab:blue", linestyle=":", label="accuracy, base model")
        bottom.set_ylabel("accuracy on test questions, %", color="tab:blue")
        layers = bottom.twinx()
        curve(layers, "layers", "layers", color="tab:red", linestyle="--")
        layers.set_ylabel("layers per forward pass", color="tab:red")
        for axis in (top, bottom):
            axis.set_xticks(x, [row["setting"] for row in rows], rotation=20 if len(rows[-1]["setting"]) > 6 else 0)
            axis.set_xlabel(panel)
        if column == 0:
            top.legend(fontsize="small")
            bottom.legend(fontsize="small")
    figure.suptitle(f"{result['ablation']}: {result['summary'][0]['seeds']} seeds, mean and standard deviation")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
