"""Table 5 in the paper's form: accuracy per set and on average, layers, and what each method adds to the base."""

from __future__ import annotations

from collections.abc import Sequence

from drllm.evaluation.outcomes import Outcome, method_row
from drllm.evaluation.text_tables import EMPTY, markdown
from drllm.rivals.interface import AnyPrompt, Cost


def table_row(
    name: str, outcomes: Sequence[Outcome], base: Outcome, prompts: Sequence[AnyPrompt], cost: Cost | None
) -> dict:
    """One method as JSON.

    Args:
        outcomes: one per seed, over `prompts`.
        base: of the unmodified model, over `prompts`.
        cost: mean over the seeds; None where it is not known.
    """
    average = Outcome.average(outcomes)
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt.question.set, []).append(index)
    by_set = {
        set_name: {
            "accuracy": sum(average.right[index] for index in indices) / len(indices),
            "layers": sum(average.layers[index] for index in indices) / len(indices),
        }
        for set_name, indices in members.items()
    }
    return method_row(name, outcomes, base, []) | {
        "questions": len(prompts),
        "sets": by_set,
        "mean_of_sets": sum(values["accuracy"] for values in by_set.values()) / len(by_set),
        "cost": None if cost is None else vars(cost),
    }


def table5(rows: Sequence[dict]) -> str:
    """The rows of `table_row` as Markdown; accuracies in percent, the average weighs sets alike."""
    sets = list(rows[0]["sets"])
    header = ["method", *sets, "average", "against base", "layers", "parameters", "training", "changes base"]
    return markdown(header, [_cells(row, sets) for row in rows])


def _cells(row: dict, sets: Sequence[str]) -> list[str]:
    against = row["against_base"]
    is_base = row["method"] == "base"
    cost = row["cost"]
    spread = f" ± {100 * row['accuracy_std']:.1f}" if row["seeds"] > 1 else ""
    return [
        row["method"],
        *(f"{100 * row['sets'][name]['accuracy']:.1f}" for name in sets),
        f"{100 * row['mean_of_sets']:.1f}{spread}",
        EMPTY if is_base else f"{against['points']:+.1f} [{against['low']:+.1f}, {against['high']:+.1f}]",
        f"{row['layers']:.2f}",
        EMPTY if cost is None or is_base else f"{cost['parameters']:,}",
        EMPTY if cost is None or cost["seconds"] is None or is_base else f"{cost['seconds']:.0f} s",
        EMPTY if cost is None or is_base else ("yes" if cost["changes_base"] else "no"),
    ]
