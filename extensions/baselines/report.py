"""The tables of a comparison: methods with paired intervals, and accuracy by set in the form of the paper's Table 5."""

from __future__ import annotations

from collections.abc import Sequence

from drllm.text_tables import EMPTY, markdown


def tables(result: dict) -> str:
    """All tables as Markdown.

    Args:
        result: what `compare` returns.
    """
    parts = [methods_table(result["rows"], result["has_options"]), sets_table(result["rows"])]
    if not result["has_options"]:
        parts.append(format_table(result["rows"]))
    if result["differences"]:
        parts.append(differences_table(result["differences"]))
    return "\n\n".join(parts)


def methods_table(rows: Sequence[dict], has_options: bool) -> str:
    """Accuracy, layers of one forward pass, and differences to the base in points with 95% intervals.

    Args:
        has_options: also report the probability of the right option.
    """
    header = ["method", "accuracy", "layers", "points against base", "points against static paths of as many layers"]
    header += ["probability of the right option, points against base"] if has_options else []
    header += ["default paths"]
    has_known = any(row.get("recovered") for row in rows)
    header += ["share of the known gain"] if has_known else []
    return markdown(header, [_method_cells(row, has_options, has_known) for row in rows])


def _method_cells(row: dict, has_options: bool, has_known: bool) -> list[str]:
    several = row["seeds"] > 1
    accuracy = f"{100 * row['accuracy']:.2f}" + (f" ± {100 * row['accuracy_std']:.2f}" if several else "")
    layers = f"{row['layers']:.2f}" + (f" ± {row['layers_std']:.2f}" if several else "")
    cells = [row["method"], accuracy, layers, _interval(row["against_base"]), _interval(row.get("against_static"))]
    cells += [_interval(row["value_against_base"])] if has_options else []
    cells += [EMPTY if row["default_share"] is None else f"{100 * row['default_share']:.0f}%"]
    if has_known:
        share = row.get("recovered")
        known = share and f"{100 * share['share']:.0f}% [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"
        cells.append(known or EMPTY)
    return cells


def sets_table(rows: Sequence[dict]) -> str:
    """Accuracy of each set in percent, their average (sets weigh alike), and what a method adds to the base."""
    sets = list(rows[0]["sets"])
    header = ["method", *sets, "average", "layers", "parameters", "training"]
    return markdown(header, [_set_cells(row, sets) for row in rows])


def _set_cells(row: dict, sets: Sequence[str]) -> list[str]:
    cost = row["cost"]
    return [
        row["method"],
        *(f"{100 * row['sets'][name]['accuracy']:.2f}" for name in sets),
        f"{100 * row['mean_of_sets']:.2f}",
        f"{row['layers']:.2f}",
        EMPTY if cost is None else f"{cost['parameters']:,}",
        EMPTY if cost is None or cost["seconds"] is None else f"{cost['seconds']:.0f} s",
    ]


def format_table(rows: Sequence[dict]) -> str:
    """Form against knowledge: the share of responses that hold an answer to grade, and the accuracy among those."""
    sets = list(rows[0]["sets"])
    header = ["responses with an answer (accuracy among them)", *sets, "all"]
    return markdown(
        header, [[row["method"], *map(_form, (*(row["sets"][name] for name in sets), row))] for row in rows]
    )


def _form(summary: dict) -> str:
    if summary["answered"] is None:
        return EMPTY
    among = summary["accuracy_of_answered"]
    return f"{100 * summary['answered']:.1f}% ({EMPTY if among is None else f'{100 * among:.2f}%'})"


def differences_table(differences: dict[str, dict[str, dict[str, float]]]) -> str:
    """Paired differences of accuracy in points, by set, with 95% intervals."""
    names = list(next(iter(differences.values())))
    rows = [[pair, *(_interval(by_set[name]) for name in names)] for pair, by_set in differences.items()]
    return markdown(["difference in points", *names], rows)


def _interval(value: dict | None) -> str:
    return EMPTY if value is None else f"{value['points']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"
