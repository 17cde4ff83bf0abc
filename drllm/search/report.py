"""What a search shows: the progress line while it runs, Table 2 and unfilled quotas at its end."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

from drllm.labels import SHORTER, WRONG_TO_RIGHT
from drllm.manifests import Manifest
from drllm.search.progress import Progress
from drllm.search.selection import Selection

COUNTS = ("original", "sampled", "visited", "inferences", WRONG_TO_RIGHT)


class Display:
    """The progress line of the main process: visited questions, simulations per second, labels so far, time left.

    Args:
        progress: what all processes have finished.
        num_processes: their number.
        is_shown: whether this is the main process.
        num_simulations: most simulations of a question.
    """

    def __init__(self, progress: Progress, num_processes: int, is_shown: bool, num_simulations: int) -> None:
        self.progress = progress
        self.num_simulations = num_simulations
        self.earlier = self._finished()  # by earlier runs
        self.simulations = 0
        self.num_processes = num_processes
        self.started = self.updated = time.monotonic()
        self.bar = tqdm(
            desc="searching",
            unit=" questions",
            initial=len(progress.selection.records),
            disable=not is_shown,
            bar_format="{desc}: {n_fmt}/{total_fmt}{unit} [{elapsed}{postfix}",
        )
        self.show()

    def after_round(self, simulations: int) -> None:
        """Reads what the other processes have finished and shows it, at most once per second.

        `simulations`: what the searches of this process have taken so far.
        """
        self.simulations = simulations
        if time.monotonic() - self.updated >= 1:
            self.progress.update()
            self.show()

    def show(self) -> None:
        """Updates the line."""
        self.updated = time.monotonic()
        records = self.progress.selection.records.values()
        labelled = [record for record in records if record.kind is not None]
        fixed = sum(record.kind == WRONG_TO_RIGHT for record in labelled)
        saved = sum(record.layers_saved for record in labelled) / max(len(labelled), 1)
        # The simulations of the other processes are not known here; they run about as many.
        rate = self.simulations * self.num_processes / max(self.updated - self.started, 1e-9)
        self.bar.total = max(self.progress.selection.expected_visits(), len(records))
        self.bar.n = len(records)
        left = tqdm.format_interval(self.seconds_left(rate)) if rate else "?"
        self.bar.set_postfix_str(
            f"at most {left} left] {rate:.0f} simulations/s, {len(labelled)} labels, {fixed} wrong-to-right, "
            f"{saved:.2f} layers saved per label",
            refresh=False,
        )
        self.bar.refresh()

    def seconds_left(self, rate: float) -> float:
        """At `rate` simulations per second, if no search ends early. Counted by simulations and not by questions: many
        are open at once and end at about one time."""
        unfinished = self.bar.total - len(self.progress.selection.records)
        begun = self.simulations * self.num_processes - (self._finished() - self.earlier)
        return max(0.0, unfinished * self.num_simulations - begun) / rate

    def _finished(self) -> int:
        return sum(record.simulations for record in self.progress.selection.records.values())


def table2_text(rows: list[dict[str, Any]]) -> str:
    """Table 2 of the paper with additional columns, from `Selection.table2`."""
    columns = ("set", "original", "sampled", "visited", "inferences", "wrong-to-right", "base accuracy", "layers saved")
    sums = {count: sum(row[count] for row in rows) for count in (*COUNTS, "base_correct")}
    saved = sum(row["layers_saved"] * row["sampled"] for row in rows) / max(sums["sampled"], 1)
    lines = [columns]
    for row in (*rows, {"set": "total", **sums, "layers_saved": saved}):
        accuracy = 100 * row["base_correct"] / max(row["visited"], 1)
        cells = [row["set"], *(row[count] for count in COUNTS), f"{accuracy:.1f}%", f"{row['layers_saved']:.2f}"]
        lines.append(tuple(str(cell) for cell in cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        line[0].ljust(widths[0])
        + "".join(f"{cell:>{width + 2}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def shortfall_lines(manifest: Manifest) -> list[str]:
    """One line per quota that could not be filled, with the reason, then the effect on all labels; empty if none."""
    lines = []
    for row in manifest.results["shortfalls"]:
        if row["kind"] == WRONG_TO_RIGHT:
            reason = f"wrong on {row['candidates']} of {row['visited']} questions, and a path fixes {row['labels']}"
        else:
            reason = f"right on {row['candidates']} of {row['visited']} questions; {row['labels']} have a shorter path"
        name = "wrong-to-right" if row["kind"] == WRONG_TO_RIGHT else SHORTER
        lines.append(f"{row['set']}: {row['labels']} of {row['quota']} {name} labels: the base model is {reason}")
    table = manifest.results["table2"]
    for row in table:
        if row["sampled"] != row["wanted"]:
            lines.append(f"{row['set']}: {row['sampled']} labels instead of {row['wanted']}")
    wanted, kept = (sum(row[count] for row in table) for count in ("wanted", "sampled"))
    if kept < wanted:
        lines.append(f"{kept} of {wanted} labels: no question is left to search")
    if lines:
        fixed = sum(row[WRONG_TO_RIGHT] for row in table)
        target = manifest.arguments["wrong_to_right_share"]
        lines.append(f"wrong-to-right: {100 * fixed / max(kept, 1):.1f}% of all labels, target {100 * target:.1f}%")
    return lines


def surplus_line(selection: Selection) -> str:
    """What searching many questions side by side cost beyond what the quotas needed."""
    questions, simulations = selection.surplus()
    records = selection.records.values()
    return (
        f"beyond the quotas: {questions} of {len(records)} visited questions, "
        f"{simulations} of {sum(record.simulations for record in records)} simulations"
    )
