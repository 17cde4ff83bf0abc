"""The table and the figure of `experiments/compare_methods.py`."""

from __future__ import annotations

from pathlib import Path

# Kind of method (the part of its name before a colon) -> marker of its points; filled unless it is a static rival.
MARKERS = {
    "base": "*",
    "paper": "s",
    "group paths": "o",
    "static": "^",
    "influence": "v",
    "early exit": "x",
    "random": "+",
}
HOLLOW = ("static", "influence")


def methods_table(result: dict) -> str:
    """The rows of a comparison as Markdown, and one line on the oracle."""

    def interval(value: dict | None) -> str:
        return "" if value is None else f"{value['points']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"

    lines = [
        "| method | accuracy | layers | points against base | points against static paths of as many layers |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        several = row["seeds"] > 1
        accuracy = f"{100 * row['accuracy']:.2f}" + (f" ± {100 * row['accuracy_std']:.2f}" if several else "")
        layers = f"{row['layers']:.2f}" + (f" ± {row['layers_std']:.2f}" if several else "")
        cells = [row["method"], accuracy, layers, interval(row["against_base"]), interval(row.get("against_static"))]
        lines.append("| " + " | ".join(cells) + " |")
    if oracle := result["oracle"]:
        lines.append(
            f"\nOracle on {oracle['questions']} of these questions: {100 * oracle['accuracy']:.1f} at "
            f"{oracle['layers']:.2f} layers (base there: {100 * oracle['base_accuracy']:.1f})."
        )
    return "\n".join(lines)


def draw_methods(result: dict, path: Path) -> None:
    """Accuracy against layers per method; error bars are 95% intervals of the paired difference from the base."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4.2))
    for kind, marker in MARKERS.items():
        rows = [row for row in result["rows"] if row["method"].split(":")[0] == kind]
        if rows:
            errors = [(row["against_base"]["high"] - row["against_base"]["low"]) / 2 for row in rows]
            # The points of a static rival are one method at several lengths; random ones belong to different methods.
            joined = len(rows) > 1 and kind != "random"
            axes.errorbar(
                [row["layers"] for row in rows],
                [100 * row["accuracy"] for row in rows],
                errors,
                fmt=f"k{marker}",
                linestyle=":" if joined else "none",
                linewidth=0.8,
                capsize=2,
                label=kind,
                markerfacecolor="none" if kind in HOLLOW else "black",
            )
    axes.set(xlabel="block applications per forward pass", ylabel="accuracy (%)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
