"""The table of `experiments/compare_methods.py`; `experiment_figures` draws its figure."""

from __future__ import annotations


def methods_table(result: dict) -> str:
    """The rows of a comparison as Markdown, and one line on the oracle."""

    def interval(value: dict | None) -> str:
        return "" if value is None else f"{value['points']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"

    def percent(value: dict) -> str:
        return f"{100 * value['share']:.0f}% [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"

    header = ["method", "accuracy", "layers", "points against base", "points against static paths of as many layers"]
    has_known = result["rows"][0].get("recovered") is not None
    header += ["share of the known gain"] if has_known else []
    has_probability = "probability" in result["rows"][0]
    header += ["probability of the right option, points against base"] if has_probability else []
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in result["rows"]:
        several = row["seeds"] > 1
        accuracy = f"{100 * row['accuracy']:.2f}" + (f" ± {100 * row['accuracy_std']:.2f}" if several else "")
        layers = f"{row['layers']:.2f}" + (f" ± {row['layers_std']:.2f}" if several else "")
        cells = [row["method"], accuracy, layers, interval(row["against_base"]), interval(row.get("against_static"))]
        cells += [percent(row["recovered"])] if has_known else []
        cells += [interval(row["probability"])] if has_probability else []
        lines.append("| " + " | ".join(cells) + " |")
    if oracle := result["oracle"]:
        lines.append(
            f"\nOracle on {oracle['questions']} of these questions: {100 * oracle['accuracy']:.1f} at "
            f"{oracle['layers']:.2f} layers (base there: {100 * oracle['base_accuracy']:.1f})."
        )
    for name, quality in result.get("details", {}).get("labels against known paths", {}).items():
        lines += ["", f"What the labels are worth, on the questions they were made from ({name}):", ""]
        lines += _label_quality(quality)
    return "\n".join(lines)


def _label_quality(quality: dict) -> list[str]:
    """Accuracy along labels and known paths, then how far the labels of each kind agree with its known path."""
    lines = ["| path of a question | accuracy | layers |", "|---|---|---|"]
    for name, values in quality["followed"].items():
        lines.append(f"| {name} | {100 * values['accuracy']:.1f} | {values['layers']:.2f} |")
    lines += [
        "",
        "| kind | labels | known skips that a label has | skips of a label that are known |",
        "|---|---|---|---|",
    ]
    for kind, values in {"all": quality["agreement"], **quality["kinds"]}.items():
        shares = f"{100 * values['skips_found']:.0f}% | {100 * values['skips_right']:.0f}%"
        lines.append(f"| {kind} | {values['questions']} | {shares} |")
    return lines
