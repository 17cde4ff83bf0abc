"""Counts what searches found and took, and how much of a label is choice: right paths, and equally short ones.

    python -m experiments.label_choice --labels out/demo/data --output results/label_choice.json

A search leaves the right paths that it came across. The shortest one becomes the label, of equally short ones that
with the fewest edits, and of those the first that was met. So another seed of the search draws other labels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

from drllm.arguments import add_shared
from drllm.errors import main_guard
from drllm.files import check_output_file
from drllm.labels import WRONG_TO_RIGHT, Label, read_labels
from drllm.provenance import command_line, write_result
from drllm.questions.sets import GROUPS
from drllm.text_tables import markdown
from train_models.paths import REPEAT, SKIP

PROGRAM = "python -m experiments.label_choice"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", nargs="+", required=True, help="folders of labels, one per draw")
    add_shared(parser, "output", required=True)
    arguments = parser.parse_args(argv)
    check_output_file(arguments.output, "--output")
    return arguments


def choice(labels: Sequence[Label]) -> dict[str, Any]:
    """What the labels of some questions leave to choice.

    Returns:
        questions: their number; skipped, repeated: per block the share of labels that skip or repeat it; right_paths:
        right paths per question that the search found; as_short: those of them that are as short as the label, the
        label included (means over questions).
    """
    blocks = list(zip(*(label.path for label in labels), strict=True))
    as_short = [sum(sum(path) == sum(label.path) for path in label.good_paths) for label in labels]
    return {
        "questions": len(labels),
        "skipped": [statistics.mean(action == SKIP for action in block) for block in blocks],
        "repeated": [statistics.mean(action == REPEAT for action in block) for block in blocks],
        "right_paths": statistics.mean(len(label.good_paths) for label in labels),
        "as_short": statistics.mean(as_short),
    }


def searched(table: Sequence[dict[str, Any]], members: Sequence[str] | set[str]) -> dict[str, Any]:
    """What the search of some sets took: the sums of a manifest's Table 2, and layers saved per label."""
    rows = [row for row in table if row["set"] in members]
    counts = {name: sum(row[name] for row in rows) for name in ("visited", "inferences", "sampled", WRONG_TO_RIGHT)}
    saved = sum(row["layers_saved"] * row["sampled"] for row in rows) / max(1, counts["sampled"])
    return counts | {"layers_saved": saved, "labels_of_sets": {row["set"]: row["sampled"] for row in rows}}


def choice_table(rows: Sequence[dict[str, Any]]) -> str:
    """One row per draw and group of sets, as Markdown."""

    def span(shares: Sequence[float]) -> str:
        return f"{100 * min(shares):.0f} to {100 * max(shares):.0f}"

    header = ["labels", "sets", "questions", "labels that skip a block, % (least to most)"]
    header += ["labels that repeat it, %", "right paths per question", "of these as short as the label"]
    header += ["visited", "inferences", "wrong-to-right", "layers saved"]
    cells = [
        [
            row["labels"],
            row["group"],
            str(row["questions"]),
            span(row["skipped"]),
            span(row["repeated"]),
            f"{row['right_paths']:.1f}",
            f"{row['as_short']:.1f}",
            *([str(row[name]) for name in ("visited", "inferences", WRONG_TO_RIGHT)] if "visited" in row else [""] * 3),
            f"{row['layers_saved']:.2f}" if "layers_saved" in row else "",
        ]
        for row in rows
    ]
    return markdown(header, cells)


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    arguments = parse_arguments(argv)
    start = time.perf_counter()
    counted = []
    for folder in arguments.labels:
        label_set = read_labels(folder)
        labels, table = label_set.labels, label_set.manifest.results.get("table2", [])
        sets = {label.set for label in labels}
        groups = {group: members for group, members in GROUPS.items() if sets & set(members)}
        for group, members in (groups or {"all": sets}).items():
            of_group = choice([label for label in labels if label.set in members])
            counted.append({"labels": folder, "group": group} | of_group | (searched(table, members) if table else {}))
    seconds = time.perf_counter() - start
    table = choice_table(counted)
    command = command_line(PROGRAM, argv)
    write_result(arguments.output, {"rows": counted}, command=command, seed=None, seconds=seconds, table=table)


if __name__ == "__main__":
    raise SystemExit(main())
