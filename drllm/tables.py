"""Tables from results: what eval.sh prints, in the form of the paper's Table 3."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import UserError
from drllm.tasks import GROUPS

BASE, ROUTER = "base", "router"
# Of lm-eval's metrics the one that stands for a task, first match.
METRICS = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none", "pass@1,create_test")


def task_name(set_name: str) -> str:
    """lm-eval's name of an in-domain set: "drllm_dart_1" for "dart-1"."""
    return "drllm_" + set_name.replace("-", "_")


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over `count` queries (None for one query)."""

    mean: float
    stderr: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate | None:
        """Mean and standard error of `values`, None when there are none."""
        values = list(values)
        if not values:
            return None
        mean = sum(values) / len(values)
        if len(values) == 1:
            return cls(mean, None, 1)
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return cls(mean, math.sqrt(variance / len(values)), len(values))


class Run:
    """One lm-eval run of `drllm.comparison`.

    Attributes:
        name: "base", "router" or "path-...".
        results: lm-eval's results JSON.
        correct: task -> document -> primary metric, for tasks that log one number a document.
        queries: task -> document -> {"blocks", "passes", "paths"}.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        try:
            self.results: dict[str, Any] = json.loads((folder / "results.json").read_text())
            self.record: dict[str, Any] = json.loads((folder / "run.json").read_text())
            rows = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is no complete run of eval.sh ({error}); run eval.sh again") from None
        self.queries: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:
            self.queries.setdefault(row["task"], {})[row["doc_id"]] = row
        self.correct: dict[str, dict[int, float]] = {}
        for path in sorted((folder / "samples").glob("*.jsonl")):
            self.correct[path.stem] = self._read_samples(path)

    def _read_samples(self, path: Path) -> dict[int, float]:
        metric = self.metric(path.stem)
        if metric is None:
            return {}
        name, _, chosen_filter = metric.partition(",")
        correct = {}
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            if sample.get("filter", "none") == chosen_filter and isinstance(sample.get(name), int | float):
                correct[sample["doc_id"]] = float(sample[name])
        return correct

    def metric(self, task: str) -> str | None:
        """The key of the task's primary metric, e.g. "acc,none"."""
        found = self.results["results"].get(task, {})
        return next((metric for metric in METRICS if metric in found), None)

    def accuracy(self, tasks: Sequence[str]) -> Estimate | None:
        """Over all questions of `tasks` alike."""
        return Estimate.of(value for task in tasks for value in self.correct.get(task, {}).values())

    def layers(self, tasks: Sequence[str]) -> Estimate | None:
        """Block applications a query ("num layers"), over all queries of `tasks` alike."""
        return Estimate.of(query["blocks"] for task in tasks for query in self.queries.get(task, {}).values())

    def share(self, tasks: Sequence[str], action: int) -> float:
        """Share of blocks skipped (0), executed (1) or repeated (2), over the queries of `tasks`."""
        paths = [path for task in tasks for query in self.queries.get(task, {}).values() for path in query["paths"]]
        return sum(path.count(str(action)) for path in paths) / max(sum(map(len, paths)), 1)


def _paired(first: dict[str, dict[int, float]], second: dict[str, dict[int, float]], tasks: Sequence[str]):
    """Estimate of second - first over the documents that both have: the pairing takes out their difficulty."""
    return Estimate.of(
        second[task][document] - value
        for task in tasks
        for document, value in first.get(task, {}).items()
        if document in second.get(task, {})
    )


def accuracy_difference(base: Run, other: Run, tasks: Sequence[str]) -> Estimate | None:
    """Of `other` over `base`, paired by question."""
    return _paired(base.correct, other.correct, tasks)


def layers_difference(base: Run, other: Run, tasks: Sequence[str]) -> Estimate | None:
    """Of `other` over `base`, paired by query."""
    blocks = [
        {task: {document: query["blocks"] for document, query in found.items()} for task, found in run.queries.items()}
        for run in (base, other)
    ]
    return _paired(*blocks, tasks)


# --------------------------------------------------------------------------------------------------------
# Text


def _percent(estimate: Estimate | None, signed: bool = False) -> str:
    if estimate is None:
        return "not run"
    error = "" if estimate.stderr is None else f" ± {100 * estimate.stderr:.2f}"
    return f"{100 * estimate.mean:{'+' if signed else ''}.2f}{error}"


def _number(estimate: Estimate | None, signed: bool = False) -> str:
    if estimate is None:
        return "not run"
    error = "" if estimate.stderr is None else f" ± {estimate.stderr:.2f}"
    return f"{estimate.mean:{'+' if signed else ''}.2f}{error}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns padded so that it reads well as plain text."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2)] + ["-" * (width + 1) + ":" for width in widths[1:]]) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table for LaTeX (booktabs)."""

    def line(row: Sequence[str]) -> str:
        escaped = (cell.replace("%", "\\%").replace("_", "\\_").replace("±", "$\\pm$") for cell in row)
        return " & ".join(escaped) + " \\\\"

    columns = "l" + "r" * (len(header) - 1)
    body = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", line(header), "\\midrule", *map(line, rows)]
    return "\n".join([*body, "\\bottomrule", "\\end{tabular}", ""])


# --------------------------------------------------------------------------------------------------------
# The comparison of eval.sh


def in_domain_columns(run: Run) -> dict[str, list[str]]:
    """Column name -> tasks: ARC, DART and Total, as far as they were run."""
    columns = {}
    for group, sets in GROUPS.items():
        tasks = [task_name(name) for name in sets if task_name(name) in run.queries]
        if tasks:
            columns[group.upper()] = tasks
    if len(columns) > 1:
        columns["Total"] = [task for tasks in columns.values() for task in tasks]
    return columns


def table3(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) in the form of Table 3: accuracy and num layers of base, + router and their difference."""
    base = runs[0]
    columns = in_domain_columns(base)
    header = ["", *(f"{name} {what}" for name in columns for what in ("acc. (%)", "layers"))]
    rows = []
    for run in runs:
        label = {BASE: "base", ROUTER: "+ router"}.get(run.name, "static path " + run.name.removeprefix("path-"))
        cells = [(_percent(run.accuracy(tasks)), _number(run.layers(tasks))) for tasks in columns.values()]
        rows.append([label, *(cell for pair in cells for cell in pair)])
        if run is not base:
            cells = [
                (
                    _percent(accuracy_difference(base, run, tasks), signed=True),
                    _number(layers_difference(base, run, tasks), signed=True),
                )
                for tasks in columns.values()
            ]
            rows.append(["difference", *(cell for pair in cells for cell in pair)])
    return header, rows


def detail(base: Run, router: Run) -> tuple[list[str], list[list[str]]]:
    """(header, rows) by task: accuracy, layers, what changed hands, and shares of skipped and repeated blocks."""
    header = ["set", "questions", "base acc. (%)", "router acc. (%)", "difference", "fixed", "broken"]
    header += ["base layers", "router layers", "difference", "skipped (%)", "repeated (%)"]
    rows = []
    for task in sorted(base.queries.keys() & router.queries.keys(), key=_order):
        pairs = [
            (right, router.correct[task][document])
            for document, right in base.correct.get(task, {}).items()
            if document in router.correct.get(task, {})
        ]
        layers = base.layers([task])
        rows.append(
            [
                task.removeprefix("drllm_"),
                str(layers.count),
                _percent(base.accuracy([task])),
                _percent(router.accuracy([task])),
                _percent(accuracy_difference(base, router, [task]), signed=True),
                str(sum(after > before for before, after in pairs)),
                str(sum(after < before for before, after in pairs)),
                _number(layers),
                _number(router.layers([task])),
                _number(layers_difference(base, router, [task]), signed=True),
                f"{100 * router.share([task], 0):.1f}",
                f"{100 * router.share([task], 2):.1f}",
            ]
        )
    return header, rows


def _order(task: str) -> tuple[int, str]:
    in_domain = [task_name(name) for sets in GROUPS.values() for name in sets]
    return (in_domain.index(task) if task in in_domain else len(in_domain), task)


def load_runs(folder: Path) -> list[Run]:
    """The complete runs below `folder`: base, router, then static paths."""
    names = [BASE, ROUTER, *sorted(path.name for path in folder.glob("path-*"))]
    runs = [Run(folder / name) for name in names if (folder / name / "run.json").is_file()]
    if [run.name for run in runs[:2]] != [BASE, ROUTER]:
        raise UserError(f"{folder} has no complete runs base and router; run eval.sh")
    return runs


def write_comparison(folder: Path) -> str:
    """Writes table.md and table.tex into `folder` from its runs and returns the Markdown."""
    runs = load_runs(folder)
    base, router = runs[:2]
    parts, tex = [], []
    if in_domain_columns(base):
        header, rows = table3(runs)
        parts.append(markdown(header, rows))
        tex.append(latex(header, rows))
    header, rows = detail(base, router)
    parts.append(markdown(header, rows))
    tex.append(latex(header, rows))
    counts = {name: base.layers(tasks).count for name, tasks in in_domain_columns(base).items()}
    settings = router.results["config"]["routing"]
    notes = [
        "Questions: " + ", ".join(f"{name} {count}" for name, count in counts.items()) + "." if counts else "",
        "± is one standard error; of differences it is that of the differences of each question.",
        "Layers: block applications of a query, counted, summed over its forward passes (prefill is one), "
        f"mean over queries; {settings['num_blocks']} blocks. Total weighs every question alike.",
        f"Routing: num_windows={settings['num_windows']}, routing_control={settings['routing_control']}; "
        f"dtype {router.results['config']['model_dtype']}; "
        f"base weights {router.results['config']['model_fingerprint']}.",
    ]
    if router.record["run"]["limit"] is not None:
        notes.append(f"Only the first {router.record['run']['limit']} questions of each task were asked.")
    command = (folder / "command.txt").read_text().strip()
    text = "\n\n".join([*parts, "\n".join(note for note in notes if note)])
    (folder / "table.md").write_text(f"{text}\n\nCommand:\n\n    {command}\n")
    (folder / "table.tex").write_text("\n".join(tex))
    return text
