"""Summary and table of an ablation over several seeds; `experiment_figures` draws it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from drllm.questions.sets import GROUPS
from drllm.text_tables import markdown

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
            if name not in ("seed", "draw") and isinstance(value, int | float):
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


def draws_table(result: dict) -> str:
    """Markdown table of an ablation over draws of labels: per draw the mean over seeds, and the spread over draws.

    Accuracy is in points against the base model, layers are block applications of one forward pass; an entry has one
    number per draw, then their mean ± standard deviation.
    """
    groups = [group for group in GROUPS if f"accuracy_{group}" in result["runs"][0]]
    by_setting: dict[str, dict[int, list[dict]]] = {}
    for run in result["runs"]:
        by_setting.setdefault(run["setting"], {}).setdefault(run["draw"], []).append(run)

    def cell(draws: dict[int, list[dict]], value, form: str) -> str:
        of_draws = [statistics.mean(map(value, runs)) for runs in draws.values()]
        spread = f" ± {statistics.stdev(of_draws):{form.lstrip('+')}}" if len(of_draws) > 1 else ""
        return " / ".join(f"{number:{form}}" for number in of_draws) + f" ({statistics.mean(of_draws):{form}}{spread})"

    def cells(draws: dict[int, list[dict]], group: str) -> list[str]:
        def points(run: dict) -> float:
            return 100 * (run[f"accuracy_{group}"] - run[f"base_accuracy_{group}"])

        return [cell(draws, points, "+.1f"), cell(draws, lambda run: run[f"layers_{group}"], ".1f")]

    header = ["training"]
    for group in groups:
        header += [f"{group.upper()}, points against base", f"{group.upper()} layers"]
    rows = [
        [setting] + [text for group in groups for text in cells(draws, group)] for setting, draws in by_setting.items()
    ]
    draws, seeds = len(result["draws"]), len({run["seed"] for run in result["runs"]})
    return markdown(header, rows) + (
        f"\n\n{draws} draws of labels, the mean over {seeds} training seeds of each, then mean ± standard deviation "
        f"over the draws; {result['test_questions']} test questions, layers of one forward pass "
        f"(base: {result['runs'][0]['base_layers']:.0f})."
    )
