"""Tables from results: what eval.sh prints, and the paper's Tables 2 to 6 with the paper's figures beside ours.

    python -m drllm.tables results/            # all folders of eval.sh below it -> results/tables/

The paper's figures are data (`paper.json`), its benchmarks are, too (`eval_tasks/benchmarks.json`).
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import UserError, main_guard
from drllm.questions.sets import GROUPS, SETS

BASE, ROUTER = "base", "router"
BENCHMARKS_FILE = Path(__file__).resolve().parents[2] / "eval_tasks" / "benchmarks.json"
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

    @classmethod
    def pooled(cls, parts: Iterable[Estimate | None]) -> Estimate | None:
        """Of all queries together, from the estimates of their `parts`: the same as `of` from all values."""
        parts = [part for part in parts if part is not None]
        count = sum(part.count for part in parts)
        if not parts or len(parts) == 1:
            return parts[0] if parts else None
        mean = sum(part.count * part.mean for part in parts) / count
        squares = sum(
            part.count * ((part.count - 1) * (part.stderr or 0.0) ** 2 + (part.mean - mean) ** 2) for part in parts
        )
        return cls(mean, math.sqrt(squares / (count - 1) / count), count)

    @classmethod
    def over_checkpoints(cls, estimates: Sequence[Estimate | None]) -> Estimate | None:
        """The mean over checkpoints that were asked the same questions.

        Its standard error over questions is at most the mean of theirs, which is what is given.
        """
        if not estimates or None in estimates:
            return None
        errors = [estimate.stderr for estimate in estimates]
        stderr = None if None in errors else statistics.mean(errors)
        return cls(statistics.mean(estimate.mean for estimate in estimates), stderr, estimates[0].count)


class Run:
    """One lm-eval run of `drllm.comparison`.

    Attributes:
        name: "base", "router", "router-2", ... (of further checkpoints) or "path-...".
        results: lm-eval's results JSON.
        correct: task -> document -> primary metric, for tasks that log one number a document.
        queries: task -> document -> {"blocks", "passes", "paths"}.
        tasks: all that layers were counted for.

    Results that are checked in come without their files by question; then both are empty, and means and standard errors
    are put together from those of the tasks.
    """

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        try:
            self.results: dict[str, Any] = json.loads((folder / "results.json").read_text())
            self.record: dict[str, Any] = json.loads((folder / "run.json").read_text())
            log = folder / "queries.jsonl"
            rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is no complete run of eval.sh ({error}); run eval.sh again") from None
        self.queries: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:
            self.queries.setdefault(row["task"], {})[row["doc_id"]] = row
        self._counted: dict[str, Any] = self.results["config"].get("block_applications", {})
        self.tasks = set(self.queries) or set(self._counted)
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
        if not self.correct:
            return Estimate.pooled(self.score(task) for task in tasks)
        return Estimate.of(value for task in tasks for value in self.correct.get(task, {}).values())

    def layers(self, tasks: Sequence[str]) -> Estimate | None:
        """Block applications a query ("num layers"), over all queries of `tasks` alike."""
        if not self.queries:
            found = [self._counted[task] for task in tasks if task in self._counted]
            return Estimate.pooled(
                Estimate(part["blocks_per_query"], part["blocks_per_query_stderr"], part["queries"]) for part in found
            )
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
        tasks = [task_name(name) for name in sets if task_name(name) in run.tasks]
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
        label = "base" if run is base else "+ " + run.name
        if run.name.startswith("path-"):
            label = "static path " + run.name.removeprefix("path-")
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


def table3_over_seeds(base: Run, routers: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) as `table3`, with the mean and standard deviation over the checkpoints of several seeds."""
    columns = in_domain_columns(base)
    header = ["", *(f"{name} {what}" for name in columns for what in ("acc. (%)", "layers"))]
    rows = [["base"], [f"+ router, {len(routers)} seeds"], ["difference"]]
    for tasks in columns.values():
        for measure, scale in ((Run.accuracy, 100), (Run.layers, 1)):
            before = scale * measure(base, tasks).mean
            after = [scale * measure(router, tasks).mean for router in routers]
            mean, spread = statistics.mean(after), statistics.stdev(after)
            rows[0].append(f"{before:.2f}")
            rows[1].append(f"{mean:.2f} ± {spread:.2f}")
            rows[2].append(f"{mean - before:+.2f} ± {spread:.2f}")
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
    """The complete runs below `folder`: base, router, those of further checkpoints, then static paths."""
    further = sorted((path.name for path in folder.glob(f"{ROUTER}-*")), key=lambda name: (len(name), name))
    names = [BASE, ROUTER, *further, *sorted(path.name for path in folder.glob("path-*"))]
    runs = [Run(folder / name) for name in names if (folder / name / "run.json").is_file()]
    if [run.name for run in runs[:2]] != [BASE, ROUTER]:
        raise UserError(f"{folder} has no complete runs base and router; run eval.sh")
    return runs


def write_comparison(folder: Path) -> str:
    """Writes table.md and table.tex into `folder` from its runs and returns the Markdown."""
    runs = load_runs(folder)
    base, router = runs[:2]
    routers = [run for run in runs if run.name.startswith(ROUTER)]
    parts, tex = [], []
    if in_domain_columns(base) and len(routers) > 1:
        header, rows = table3_over_seeds(base, routers)
        parts.append(markdown(header, rows) + "\n\nAbove, ± is one standard deviation over seeds; seed by seed:")
        tex.append(latex(header, rows))
    if in_domain_columns(base):
        header, rows = table3(runs)
        parts.append(markdown(header, rows))
        tex.append(latex(header, rows))
    header, rows = detail(base, router)
    first = f"By task, the first of {len(routers)} checkpoints:\n\n" if len(routers) > 1 else ""
    parts.append(first + markdown(header, rows))
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


def _beside(paper: float | None, ours: Estimate | float | None, scale: float = 1, digits: int = 1) -> str:
    """One cell: paper / ours ± standard error (n questions) / difference."""
    known = UNKNOWN if paper is None else f"{paper:g}"
    if ours is None:
        return f"{known} / not run"
    mean, error = scale * (ours.mean if isinstance(ours, Estimate) else ours), ""
    if isinstance(ours, Estimate):
        error = "" if ours.stderr is None else f" ± {scale * ours.stderr:.{digits}f}"
        error += f" (n={ours.count})"
    difference = "" if paper is None else f" / {mean - paper:+.{digits}f}"
    return f"{known} / {mean:.{digits}f}{error}{difference}"


@dataclass(frozen=True)
class Evaluated:
    """One folder of eval.sh: its base run and those of its checkpoints, and under which name its rows are shown."""

    model: str
    folder: Path
    base: Run
    routers: tuple[Run, ...]

    @property
    def rows(self) -> list[tuple[str, tuple[Run, ...]]]:
        """(the paper's name of the row, runs whose mean it shows)."""
        return [("base", (self.base,)), ("+ router", self.routers)]


def find_evaluations(results: Path, paper: dict[str, Any]) -> list[Evaluated]:
    """All folders of eval.sh below `results`, the paper's models under the paper's names."""
    names = {model["id"]: model["paper"] for model in paper["models"]}
    found = []
    for record in sorted(results.rglob(f"{ROUTER}/run.json")):
        folder = record.parent.parent
        base, *others = load_runs(folder)
        routers = tuple(run for run in others if run.name.startswith(ROUTER))
        base_model = routers[0].results["config"]["routing"].get("base_model_name")
        place = folder.relative_to(results) if folder != results else Path(folder.resolve().name)
        found.append(Evaluated(names.get(base_model, str(place)), folder, base, routers))
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
            row = ours.get(set_name, {})
            counts = [row.get(key) for key in ("sampled", "wrong_to_right", "visited", "inferences")]
            rate = row["inferences"] / row["visited"] if row.get("visited") else None
            cells = [
                _beside(known, count, digits=0)
                for known, count in zip((sampled, None, None, None), counts, strict=True)
            ]
            rate_cell = _beside(paper["table2"]["inferences_per_visited_question"], rate)
            rows.append([name, set_name, *cells, rate_cell])
    return header, rows


def search_command(manifest: dict[str, Any]) -> str | None:
    """The command that repeats the search of a labels' manifest."""
    if "arguments" not in manifest:
        return None
    options = dict(manifest["arguments"])
    options["dataset"] = ",".join(options["dataset"])
    options["samples"] = ",".join(f"{name}={count}" for name, count in options["samples"].items())
    options |= {name: manifest.get(name) for name in ("revision", "data_dir", "seed", "dtype")}
    options["chat_template"] = "on" if manifest["chat_template"] else "off"
    command = ["python", "data_generation.py", "--model", manifest["model"]]
    for name, value in options.items():
        command += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(command)


def paper_table3(paper: dict[str, Any], evaluations: list[Evaluated]):
    """In-domain accuracy and layers of each model, base and routed."""
    groups = (*(group.upper() for group in GROUPS), "Total")
    header = ["model", "", *(f"{group} {what}" for group in groups for what in ("accuracy", "layers"))]
    rows = []
    for model, found in _by_model(paper, evaluations):
        found = [evaluated for evaluated in found if in_domain_columns(evaluated.base)]
        for label, runs in found[-1].rows if found else (("base", ()), ("+ router", ())):
            known = paper["table3"].get(model, {}).get(label, {})
            columns = in_domain_columns(runs[0]) if runs else {}
            cells = []
            for group in groups:
                tasks = columns.get(group)
                accuracy, layers = (
                    Estimate.over_checkpoints([measure(run, tasks) for run in runs]) if tasks else None
                    for measure in (Run.accuracy, Run.layers)
                )
                cells.append(_beside(known.get(f"{group} accuracy"), accuracy, scale=100))
                cells.append(_beside(known.get(f"{group} layers"), layers, digits=2))
            rows.append([model, _with_count(label, runs), *cells])
    return header, rows


def _with_count(label: str, runs: Sequence[Run]) -> str:
    return f"{label}, {len(runs)} seeds" if len(runs) > 1 else label


def paper_scores(paper: dict[str, Any], evaluations: list[Evaluated], table: int):
    """Scores (%) on the benchmarks of Table 4 or 5 of each model, base and routed."""
    columns = [benchmark for benchmark in benchmarks() if table in benchmark["tables"]]
    header = ["model", "", *(benchmark["paper"] for benchmark in columns)]
    rows = []
    for model, found in _by_model(paper, evaluations):
        for place, label in enumerate(("base", "+ router")):
            known = paper[f"table{table}"].get(model, {}).get(label, {})
            cells = []
            for benchmark in columns:
                scores = [
                    Estimate.over_checkpoints([run.score(benchmark["task"]) for run in evaluated.rows[place][1]])
                    for evaluated in found
                ]
                score = next((score for score in reversed(scores) if score is not None), None)
                # lm-eval's squadv2 is in percent already
                scale = 1 if benchmark["task"] == "squadv2" else 100
                cells.append(_beside(known.get(benchmark["paper"]), score, scale))
            rows.append([model, label, *cells])
    return header, rows


def _has_scores(evaluated: Evaluated, table: int) -> bool:
    return any(
        evaluated.base.score(benchmark["task"]) is not None
        for benchmark in benchmarks()
        if table in benchmark["tables"]
    )


def paper_table6(paper: dict[str, Any], result: dict[str, Any] | None):
    """What routers read: accuracy, layers and F1, by the JSON of `python -m drllm.ablations table6`."""
    header = ["router input", "accuracy", "base accuracy", "layers", "macro F1"]
    rows = []
    for setting in ("previous_layer", "embeddings"):
        row = next((row for row in result["summary"] if row["setting"] == setting), {}) if result else {}
        known = paper["table6"].get(setting, {})
        cells = []
        for name, scale, digits in (
            ("accuracy", 100, 1),
            ("base_accuracy", 100, 1),
            ("layers", 1, 2),
            ("macro_f1", 1, 3),
        ):
            ours = None
            if name in row:
                ours = Estimate(row[name]["mean"], row[name].get("std"), result.get("test_questions", 0))
            cells.append(_beside(known.get(name), ours, scale, digits))
        rows.append([setting, *cells])
    return header, rows


def write_paper_tables(results: Path, output: Path) -> list[Path]:
    """Writes table2..table6 (.md and .tex) into `output` from everything below `results`."""
    paper = json.loads(PAPER_FILE.read_text())
    evaluations = find_evaluations(results, paper)
    manifests: list[tuple[str, dict[str, Any]]] = []
    for evaluated in evaluations:
        path = evaluated.folder / "labels_manifest.json"
        if path.is_file() and "table2" in (manifest := json.loads(path.read_text())):
            known = [searched for name, searched in manifests if name == evaluated.model]
            if manifest not in known:  # several evaluations share one search
                manifests.append((evaluated.model, manifest))
    ablations = sorted(results.rglob("table6.json"))
    table6 = json.loads(ablations[-1].read_text()) if ablations else None

    def commands_of(is_shown) -> list[str]:
        files = [evaluated.folder / "command.txt" for evaluated in evaluations if is_shown(evaluated)]
        return [path.read_text().strip() for path in files if path.is_file()]

    built = {
        "table2": (paper_table2(paper, manifests), [search_command(manifest) for _, manifest in manifests]),
        "table3": (paper_table3(paper, evaluations), commands_of(lambda found: in_domain_columns(found.base))),
        "table4": (paper_scores(paper, evaluations, 4), commands_of(lambda found: _has_scores(found, 4))),
        "table5": (paper_scores(paper, evaluations, 5), commands_of(lambda found: _has_scores(found, 5))),
        "table6": (paper_table6(paper, table6), [table6.get("command")] if table6 else []),
    }
    errors = dict.fromkeys(built, "± is one standard error over n questions") | {
        "table2": "counts of one search",
        "table6": "± is one standard deviation over seeds, n test questions each",
    }
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, ((header, rows), commands) in built.items():
        lines = [
            f"Table {name[-1]}: paper / ours / difference; {errors[name]}.",
            f"{UNKNOWN}: the paper's figure was not at hand (drllm/paper.json holds those that were).",
        ]
        after = ["Commands:", "", *(f"    {command}" for command in sorted({*commands} - {None}))] if commands else []
        text = [*lines, "", markdown(header, rows), "", *after, *([""] if after else [])]
        (output / f"{name}.md").write_text("\n".join(text))
        comments = "".join(f"% {line.strip()}\n" for line in (*lines, *after) if line)
        (output / f"{name}.tex").write_text(latex(header, rows) + comments)
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
