"""Summary and table of an ablation over several seeds; `experiment_figures` draws it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

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
