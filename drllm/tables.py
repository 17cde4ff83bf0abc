"""Tables from results: what eval.sh prints, and the paper's Tables 2 to 6 with the paper's figures beside ours.

    python -m drllm.tables results/            # all folders of eval.sh below it -> results/tables/

The paper's figures are data (`paper.json`), its benchmarks are, too (`eval_tasks/benchmarks.json`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import UserError, main_guard
from drllm.tasks import GROUPS, SETS

BASE, ROUTER = "base", "router"
BENCHMARKS_FILE = Path(__file__).resolve().parents[1] / "eval_tasks" / "benchmarks.json"
PAPER_FILE = Path(__file__).with_name("paper.json")
# For tasks that are no benchmark of the paper: the metric that stands for them, first match.
METRICS = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none", "f1,none")


def task_name(set_name: str) -> str:
    """lm-eval's name of an in-domain set: "drllm_dart_1" for "dart-1"."""
    return "drllm_" + set_name.replace("-", "_")


def benchmarks() -> list[dict[str, Any]]:
    """The paper's benchmarks: paper, tables, task, metric, shots, max_new_tokens."""
    return json.loads(BENCHMARKS_FILE.read_text())["benchmarks"]


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
        known = [benchmark["metric"] for benchmark in benchmarks() if benchmark["task"] == task]
        return next((metric for metric in (*known, *METRICS) if metric in found), None)

    def leaves(self, task: str) -> list[str]:
        """The tasks that were run under the name `task`: itself, or those below a group."""
        children = self.results.get("group_subtasks", {}).get(task, [])
        return [leaf for child in children for leaf in self.leaves(child)] or [task]

    def score(self, task: str) -> Estimate | None:
        """The primary metric of a task or group as lm-eval reports it, None when it was not run."""
        metric = self.metric(task)
        if metric is None:
            return None
        found, (name, _, chosen_filter) = self.results["results"][task], metric.partition(",")
        stderr = found.get(f"{name}_stderr,{chosen_filter}")
        count = sum(self.results["n-samples"][leaf]["effective"] for leaf in self.leaves(task))
        return Estimate(found[metric], stderr if isinstance(stderr, float) else None, count)

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
    """(header, rows) by task: score, layers, what changed hands, and shares of skipped and repeated blocks.

    Groups of tasks that are not in-domain (mmlu, agieval) get one row.
    """
    header = ["task", "questions", "base score (%)", "router score (%)", "difference", "fixed", "broken"]
    header += ["base layers", "router layers", "difference", "skipped (%)", "repeated (%)"]
    rows = []
    for name, tasks in sorted(_rows_of(base).items(), key=lambda item: _order(item[0])):
        pairs = [
            (before, router.correct[task][document])
            for task in tasks
            for document, before in base.correct.get(task, {}).items()
            if document in router.correct.get(task, {})
        ]
        rows.append(
            [
                name.removeprefix("drllm_"),
                str(base.layers(tasks).count),
                _percent(base.score(name)),
                _percent(router.score(name)),
                _percent(accuracy_difference(base, router, tasks), signed=True),
                str(sum(after > before for before, after in pairs)),
                str(sum(after < before for before, after in pairs)),
                _number(base.layers(tasks)),
                _number(router.layers(tasks)),
                _number(layers_difference(base, router, tasks), signed=True),
                f"{100 * router.share(tasks, 0):.1f}",
                f"{100 * router.share(tasks, 2):.1f}",
            ]
        )
    return header, rows


def _rows_of(run: Run) -> dict[str, list[str]]:
    """Row name -> tasks: the in-domain sets one by one, other tasks and groups as they were asked for."""
    in_domain = {task_name(name) for name in SETS}
    rows = {}
    for name in run.record["run"]["tasks"].split(","):
        leaves = [leaf for leaf in run.leaves(name) if leaf in run.queries]
        if in_domain.issuperset(leaves):
            rows |= {leaf: [leaf] for leaf in leaves}
        else:
            rows[name] = leaves
    return rows


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


# --------------------------------------------------------------------------------------------------------
# The paper's tables

UNKNOWN = "?"


def _beside(paper: float | None, ours: float | None, signed: bool = False) -> str:
    """One cell: paper / ours / difference."""
    if ours is None:
        return f"{UNKNOWN if paper is None else f'{paper:g}'} / not run"
    difference = "" if paper is None else f" / {ours - paper:+.1f}"
    return f"{UNKNOWN if paper is None else f'{paper:g}'} / {ours:.1f}{difference}"


@dataclass(frozen=True)
class Evaluated:
    """One folder of eval.sh: its base and routed run, and under which name its rows are shown."""

    model: str
    folder: Path
    base: Run
    router: Run


def find_evaluations(results: Path, paper: dict[str, Any]) -> list[Evaluated]:
    """All folders of eval.sh below `results`, the paper's models under the paper's names."""
    names = {model["id"]: model["paper"] for model in paper["models"]}
    found = []
    for record in sorted(results.rglob(f"{ROUTER}/run.json")):
        folder = record.parent.parent
        base, router = load_runs(folder)[:2]
        base_model = router.results["config"]["routing"].get("base_model_name")
        found.append(Evaluated(names.get(base_model, str(folder.relative_to(results))), folder, base, router))
    return found


def _by_model(paper: dict[str, Any], evaluations: list[Evaluated]) -> list[tuple[str, list[Evaluated]]]:
    """The paper's models in its order, then our own (the miniature)."""
    names = [model["paper"] for model in paper["models"]]
    names += [evaluated.model for evaluated in evaluations if evaluated.model not in names]
    return [
        (name, [evaluated for evaluated in evaluations if evaluated.model == name]) for name in dict.fromkeys(names)
    ]


def paper_table2(paper: dict[str, Any], manifests: list[tuple[str, dict[str, Any]]]):
    """Sampled questions a set and inferences a visited question, by labels; "not run" without any."""
    header = ["labels", "set", "sampled", "wrong to right", "visited", "inferences", "inferences a visited question"]
    rows = []
    for name, manifest in manifests or [("none", {"table2": []})]:
        ours = {row["set"]: row for row in manifest["table2"]}
        for set_name, sampled in paper["table2"]["sampled"].items():
            row = ours.get(set_name)
            visited, inferences = (row["visited"], row["inferences"]) if row else (None, None)
            rate = inferences / visited if visited else None
            rows.append(
                [
                    name,
                    set_name,
                    _beside(sampled, row and row["sampled"]),
                    _beside(None, row and row["wrong_to_right"]),
                    _beside(None, visited),
                    _beside(None, inferences),
                    _beside(paper["table2"]["inferences_per_visited_question"], rate),
                ]
            )
    return header, rows


def paper_table3(paper: dict[str, Any], evaluations: list[Evaluated]):
    """In-domain accuracy and layers of each model, base and routed."""
    groups = ("ARC", "DART", "Total")
    header = ["model", "", *(f"{group} {what}" for group in groups for what in ("accuracy", "layers"))]
    rows = []
    for model, found in _by_model(paper, evaluations):
        for label, which in (("base", "base"), ("+ router", "router")):
            known = paper["table3"].get(model, {}).get(label, {})
            run = getattr(found[-1], which) if found else None
            columns = in_domain_columns(run) if run else {}
            cells = []
            for group in groups:
                accuracy = run.accuracy(columns[group]) if group in columns else None
                layers = run.layers(columns[group]) if group in columns else None
                cells.append(_beside(known.get(f"{group} accuracy"), accuracy and 100 * accuracy.mean))
                cells.append(_beside(known.get(f"{group} layers"), layers and layers.mean))
            rows.append([model, label, *cells])
    return header, rows


def paper_scores(paper: dict[str, Any], evaluations: list[Evaluated], table: int):
    """Scores (%) on the benchmarks of Table 4 or 5 of each model, base and routed."""
    columns = [benchmark for benchmark in benchmarks() if table in benchmark["tables"]]
    header = ["model", "", *(benchmark["paper"] for benchmark in columns)]
    rows = []
    for model, found in _by_model(paper, evaluations):
        for label, which in (("base", "base"), ("+ router", "router")):
            known = paper[f"table{table}"].get(model, {}).get(label, {})
            cells = []
            for benchmark in columns:
                scores = [getattr(evaluated, which).score(benchmark["task"]) for evaluated in found]
                score = next((score for score in scores if score is not None), None)
                # lm-eval's squadv2 is in percent already
                scale = 1 if benchmark["task"] == "squadv2" else 100
                cells.append(_beside(known.get(benchmark["paper"]), score and scale * score.mean))
            rows.append([model, label, *cells])
    return header, rows


def paper_table6(paper: dict[str, Any], results: Path):
    """What routers read: accuracy, layers and F1, mean of the seeds, from `python -m drllm.ablations table6`."""
    header = ["router input", "accuracy", "base accuracy", "layers", "macro F1"]
    sources = sorted(results.rglob("table6.json"))
    rows = []
    for setting in ("previous_layer", "embeddings"):
        row = {}
        if sources:
            summary = json.loads(sources[-1].read_text())["summary"]
            row = next((row for row in summary if row["setting"] == setting), {})
        known = paper["table6"].get(setting, {})
        cells = []
        for name, scale in (("accuracy", 100), ("base_accuracy", 100), ("layers", 1), ("macro_f1", 1)):
            cells.append(_beside(known.get(name), scale * row[name]["mean"] if name in row else None))
        rows.append([setting, *cells])
    return header, rows


def write_paper_tables(results: Path, output: Path) -> list[Path]:
    """Writes table2..table6 (.md and .tex) into `output` from everything below `results`."""
    paper = json.loads(PAPER_FILE.read_text())
    evaluations = find_evaluations(results, paper)
    manifests = []
    for evaluated in evaluations:
        path = evaluated.folder / "labels_manifest.json"
        if path.is_file() and "table2" in (manifest := json.loads(path.read_text())):
            manifests.append((evaluated.model, manifest))
    built = {
        "table2": paper_table2(paper, manifests),
        "table3": paper_table3(paper, evaluations),
        "table4": paper_scores(paper, evaluations, 4),
        "table5": paper_scores(paper, evaluations, 5),
        "table6": paper_table6(paper, results),
    }
    commands = {
        (evaluated.folder / "command.txt").read_text().strip()
        for evaluated in evaluations
        if (evaluated.folder / "command.txt").is_file()
    }
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (header, rows) in built.items():
        title = f"Table {name[-1]}: paper / ours / difference; {UNKNOWN} where the paper's figure is not in paper.json."
        lines = [title, "", markdown(header, rows), ""]
        lines += ["Commands:", "", *(f"    {command}" for command in sorted(commands)), ""] if commands else []
        (output / f"{name}.md").write_text("\n".join(lines))
        (output / f"{name}.tex").write_text(latex(header, rows))
        written.append(output / f"{name}.md")
    return written


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Rebuilds the paper's tables; prints them and where they are."""
    parser = argparse.ArgumentParser(prog="python -m drllm.tables", description="The paper's Tables 2 to 6.")
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"), help="default: results/")
    parser.add_argument("--output", type=Path, help="default: tables/ below the results")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        raise UserError(f"{args.results} does not exist; eval.sh writes results")
    for path in write_paper_tables(args.results, args.output or args.results / "tables"):
        print(path.read_text())
        print(f"wrote {path} and {path.with_suffix('.tex')}\n")


if __name__ == "__main__":
    raise SystemExit(main())
