"""The paper's Tables 2 to 6 with our numbers beside the paper's, from everything in a folder of results."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drllm.evaluation.comparison_table import mean_over_sets
from drllm.evaluation.results import BASE, Estimate, Run, benchmarks, has_unweighted_score, in_domain_columns
from drllm.files import write_whole
from drllm.manifests import Manifest
from drllm.paper.numbers import Cell, paper_models, paper_sets, paper_table, printed
from drllm.paper.result_files import (
    Evaluated,
    experiment_files,
    find_evaluations,
    find_searches,
    search_command,
)
from drllm.text_tables import EMPTY, NOT_RUN, Table, latex, markdown, with_error

ROWS = (BASE, "+ router")
AVERAGE_DIFFERENCE, AVERAGE = "Avg. Δ", "Avg."
# The paper's names of benchmarks in Table 4 where they differ from those of eval_tasks/benchmarks.json.
BENCHMARK_NAMES = {"TQA": "TruthfulQA", "GPQA D": "GPQA Diamond"}
TABLE5_MODEL, TABLE6_MODEL = "LLaMA-8B-Instruct", "LLaMA-3B-Instruct"
# Rows of Table 6 -> setting of `experiments/ablations.py table6`, prefix of the names in its summary.
TABLE6_ROWS = {
    "Prev. layer H_{i-1} (Dr.LLM)": ("previous_layer", "accuracy"),
    "First layer H_1 (embeddings)": ("embeddings", "accuracy"),
    "No routing (vanilla model)": ("previous_layer", "base_accuracy"),
}


@dataclass
class Document:
    """One of the paper's tables beside our results: parts with a heading each, notes, and the commands behind it."""

    number: int
    parts: list[tuple[str, Table]]
    notes: list[str]
    commands: Iterable[str | None] = field(default_factory=list)

    def write(self, folder: Path) -> Path:
        """Writes table{number}.md and .tex into `folder`; returns the path of the first."""
        table = paper_table(self.number)
        intro = f"Table {self.number} of the paper, beside our results. The paper's caption: {table.caption}"
        notes = ["Cells: paper / ours / ours - paper.", *self.notes, f"The paper's own numbers: {table.note}"]
        commands = sorted({command for command in self.commands if command})
        text = [intro]
        for heading, (header, rows) in self.parts:
            text += [heading] * bool(heading) + [markdown(header, rows)]
        text.append("\n".join(f"* {note}" for note in notes))
        if commands:
            text += ["Commands:", "\n".join(f"    {command}" for command in commands)]
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"table{self.number}.md", "\n\n".join(text) + "\n")
        comments = "".join(f"% {line}\n" for line in (intro, *notes, *commands))
        tex = "\n".join([f"% {heading}\n" * bool(heading) + latex(*part) for heading, part in self.parts])
        write_whole(folder / f"table{self.number}.tex", tex + comments)
        return folder / f"table{self.number}.md"


def beside(paper: Cell | None, ours: Estimate | None, scale: float = 1, digits: int = 1, change: str = "") -> str:
    """One cell: paper / ours / difference.

    Args:
        paper: what the paper prints, None for a cell it does not have.
        ours: None when it was not run.
        scale: factor of ours, 100 for percent.
        digits: decimals of ours; 0 for counts, which have no error.
        change: text behind our number, e.g. its difference from the base model.
    """
    left = EMPTY if paper is None else printed(paper)
    if ours is None:
        return f"{left} / {NOT_RUN}"
    number = f"{ours.mean:,.0f}" if digits == 0 else with_error(ours, scale, digits)
    text = f"{left} / {number}{change}"
    return text if paper is None else f"{text} / {scale * ours.mean - paper['value']:+,.{digits}f}"


def _by_model(evaluations: Sequence[Evaluated]) -> dict[str, list[Evaluated]]:
    """The paper's models in its order, then others; each with its evaluations."""
    names = [model["paper"] for model in paper_models()] + [evaluated.model for evaluated in evaluations]
    return {name: [evaluated for evaluated in evaluations if evaluated.model == name] for name in names}


# Columns of Table 2 -> counts in a row of the labels' manifest.
TABLE2_COUNTS = {"Original": "original", "Sampled": "sampled", "Visited": "visited", "#Inferences": "inferences"}


def _searched(manifest: Manifest, rows: Iterable[str]) -> dict[str, dict[str, int]]:
    """Row -> column -> count of one search; "Total" over the rows of the paper."""
    sets = paper_sets()
    found = {
        sets.get(row["set"], row["set"]): {column: row[key] for column, key in TABLE2_COUNTS.items() if key in row}
        for row in manifest.results["table2"]
    }
    parts = [counts for name, counts in found.items() if name in rows]
    total = {column: sum(part[column] for part in parts) for column in (parts[0] if parts else ())}
    return found | {"Total": total}


def table2(evaluations: Sequence[Evaluated]) -> Document:
    """Original, Sampled, Visited and #Inferences per set and in total, one part per search."""
    paper = paper_table(2)
    searches = find_searches(evaluations) or [Manifest(results={"table2": []})]
    parts, notes = [], []
    for manifest in searches:
        model, ours = manifest.model, _searched(manifest, paper.rows)
        rows = []
        for name in [*paper.rows, *(name for name in ours if name not in paper.rows)]:
            cells = [name]
            for column in paper.columns:
                count = ours.get(name, {}).get(column)
                estimate = None if count is None else Estimate(count, None, count)
                cells.append(beside(paper.rows.get(name, {}).get(column), estimate, digits=0))
            rows.append(cells)
        parts.append((f"Labels of {model}:" if model else "", (["", *paper.columns], rows)))
        if visited := ours["Total"].get("Visited"):
            rate = ours["Total"]["#Inferences"] / visited
            notes.append(f"#Inferences / Visited of {model}: {rate:.1f} (39.5 in the paper).")
        if (limit := manifest.arguments.get("limit")) is not None:
            notes.append(f"The search of {model} was limited to the first {limit} questions of each set (Original).")
    notes.append("Original is the number of questions to choose from: distinct questions in ours, rows in the paper.")
    return Document(2, parts, notes, [search_command(manifest) for manifest in searches])


def _mean(evaluated: Evaluated, row: str, measure: Callable[..., Estimate | None], tasks: Sequence[str]):
    """Estimate of `Run.accuracy` or `Run.layers` in `row`: the mean over sets, then over checkpoints."""
    estimates = [mean_over_sets(functools.partial(measure, run), tasks) for run in evaluated.runs(row)]
    return Estimate.over_checkpoints(estimates)


def _table3_cells(evaluated: Evaluated | None, row: str, known: dict[str, Cell] | None) -> list[str]:
    """Accuracy and num layers of ARC, DART and Total in one row of Table 3."""
    cells = []
    columns = in_domain_columns(evaluated.base) if evaluated else {}
    for column in paper_table(3).columns:
        group, _, what = column.partition(" ")
        measure, scale, digits = (Run.accuracy, 100, 1) if what == "Accuracy" else (Run.layers, 1, 2)
        ours, change = None, ""
        if evaluated and group in columns:
            ours = _mean(evaluated, row, measure, columns[group])
            base = _mean(evaluated, BASE, measure, columns[group])
            if row != BASE and ours and base:
                change = f" ({scale * (ours.mean - base.mean):+.{digits}f})"
        cells.append(beside(None if known is None else known[column], ours, scale, digits, change))
    return cells


def table3(evaluations: Sequence[Evaluated]) -> Document:
    """In-domain accuracy and layers of each backbone, base and routed."""
    paper = paper_table(3)
    rows, counts, shown = [], [], []
    for model, folders in _by_model(evaluations).items():
        in_domain = [evaluated for evaluated in folders if in_domain_columns(evaluated.base)]
        evaluated = in_domain[-1] if in_domain else None
        if evaluated is None and model not in paper.rows:
            continue
        for row in ROWS:
            known = paper.rows[model][row] if model in paper.rows else None
            seeds = len(evaluated.routers) if evaluated and row != BASE else 1
            label = f"{row}, {seeds} seeds" if seeds > 1 else row
            rows.append([model, label, *_table3_cells(evaluated, row, known)])
        if evaluated:
            shown.append(evaluated)
            columns = in_domain_columns(evaluated.base).items()
            sizes = [f"{name} {evaluated.base.layers(tasks).count} ({len(tasks)} sets)" for name, tasks in columns]
            counts.append(f"{model}: {', '.join(sizes)}")
    notes = [
        "Total is the paper's: every set has the same weight, so it is 2/7 ARC + 5/7 DART when all seven were run; "
        "the same for layers.",
        "± is one standard error over questions. In parentheses: the change from the base model.",
        "The paper tested about 100 questions per set. 700 questions measure an accuracy of 50% to ±3.7 points (95% "
        "interval), the 200 of ARC to ±6.9, the 500 of DART to ±4.4: the mean gain of 2.25 points is "
        "inside one interval.",
    ]
    notes += [f"Questions of ours: {'; '.join(counts)}."] * bool(counts)
    return Document(3, [("", (["model", "", *paper.columns], rows))], notes, [found.command for found in shown])


def _scores(folders: Sequence[Evaluated], row: str, columns: Iterable[str]) -> dict[str, Estimate]:
    """Column -> score in percent of the benchmarks that were run, of the last folder that has it."""
    tasks = {benchmark["paper"]: benchmark["task"] for benchmark in benchmarks()}
    scores = {}
    for column in columns:
        task = tasks.get(BENCHMARK_NAMES.get(column, column))
        for evaluated in folders if task else ():
            score = Estimate.over_checkpoints([run.score(task) for run in evaluated.runs(row)])
            if score is not None:
                scale = 1 if task == "squadv2" else 100  # lm-eval's squadv2 is in percent already
                stderr = None if score.stderr is None else scale * score.stderr
                scores[column] = Estimate(scale * score.mean, stderr, score.count)
    return scores


def _commands(evaluations: Sequence[Evaluated], columns: Sequence[str]) -> list[str | None]:
    return [found.command for found in evaluations if _scores([found], BASE, columns)]


def _weighted(folders: Sequence[Evaluated]) -> Iterator[str]:
    """A sentence for each benchmark whose score is unweighted, with the score that weighs questions alike."""
    for benchmark in benchmarks():
        task = benchmark["task"]
        for evaluated in folders if has_unweighted_score(task) else ():
            scores = [Estimate.over_checkpoints([run.reported(task) for run in evaluated.runs(row)]) for row in ROWS]
            if None not in scores:
                yield (
                    f"{benchmark['paper']} of {evaluated.model} is the mean of its subtasks; weighed by their "
                    f"questions, as lm-eval does: {', + router '.join(with_error(score, 100, 1) for score in scores)}."
                )


def table4(evaluations: Sequence[Evaluated]) -> Document:
    """Scores on out-of-domain benchmarks of each instruct backbone, with standard errors and mean difference."""
    paper = paper_table(4)
    names = {model["paper"]: model.get("table4") for model in paper_models()}
    tasks = [column for column in paper.columns if column != AVERAGE_DIFFERENCE]
    rows, counts = [], []
    for model, folders in _by_model(evaluations).items():
        scores = {row: _scores(folders, row, tasks) for row in ROWS}
        name = names.get(model)
        if name is None and not scores[BASE]:
            continue
        for row in ROWS:
            known = paper.rows[name][row] if name else {}
            cells = [beside(known.get(column), scores[row].get(column), digits=1) for column in tasks]
            cells.append(EMPTY if row == BASE else _average_difference(known.get(AVERAGE_DIFFERENCE), scores, tasks))
            rows.append([name or model, row, *cells])
        if scores[BASE]:
            sizes = ", ".join(f"{column} {score.count}" for column, score in scores[BASE].items())
            counts.append(f"{name or model}: {sizes}")
    notes = [
        "± is one standard error, in ours that of lm-eval.",
        f"{AVERAGE_DIFFERENCE}: mean over benchmarks of + router minus base; its mean over models is -0.85.",
        *_weighted(evaluations),
    ]
    notes += [f"Questions of ours: {'; '.join(counts)}."] * bool(counts)
    return Document(4, [("", (["model", "", *paper.columns], rows))], notes, _commands(evaluations, tasks))


def _average_difference(known: Cell | None, scores: dict[str, dict[str, Estimate]], tasks: Sequence[str]) -> str:
    """Our mean difference; compared with the paper's only when all its benchmarks were run."""
    differences = [
        scores["+ router"][column].mean - scores[BASE][column].mean
        for column in tasks
        if column in scores[BASE] and column in scores["+ router"]
    ]
    if not differences:
        return beside(known, None)
    mean = statistics.mean(differences)
    if len(differences) == len(tasks):
        return beside(known, Estimate(mean, None, len(tasks)), digits=2)
    return f"{EMPTY if known is None else printed(known)} / {mean:.2f} ({len(differences)} of {len(tasks)} run)"


def table5(evaluations: Sequence[Evaluated]) -> Document:
    """Dr.LLM beside other methods; of the others only the paper's numbers."""
    paper = paper_table(5)
    columns = [column for column in paper.columns if column != AVERAGE]
    scores = {model: _scores(folders, "+ router", columns) for model, folders in _by_model(evaluations).items()}
    rows = []
    for name, known in paper.rows.items():
        rows.append([name, *_table5_cells(known, scores[TABLE5_MODEL] if name == "Dr.LLM" else {}, columns)])
    for model, ours in scores.items():
        if ours and model != TABLE5_MODEL:
            rows.append([f"{model} + router", *_table5_cells({}, ours, columns)])
    notes = [
        f"Dr.LLM is {TABLE5_MODEL} + router; the other methods' numbers are FlexiDepth's, on Llama-3-8B. "
        "We ran the other methods on other base models: results/miniature and results/smollm2.",
        f"{AVERAGE} is shown for ours when all benchmarks were run. ± is one standard error, that of lm-eval.",
    ]
    return Document(5, [("", (["", *paper.columns], rows))], notes, _commands(evaluations, columns))


def _table5_cells(known: dict[str, Cell], ours: dict[str, Estimate], columns: Sequence[str]) -> list[str]:
    average = Estimate.equally_weighted([ours.get(column) for column in columns])
    return [
        beside(known.get(column), score) for column, score in [*((c, ours.get(c)) for c in columns), (AVERAGE, average)]
    ]


def table6(results: Path) -> Document:
    """Accuracy of routers that read the previous block or the embeddings, and of the base model."""
    paper = paper_table(6)
    ablations = [(path, found) for path, found in experiment_files(results) if found.get("ablation") == "table6"]
    models = {model["id"]: model["paper"] for model in paper_models()}
    ours, others, notes = {}, [], []
    for path, found in ablations:
        model = found["labels"].get("model") or str(path.parent.relative_to(results))
        rows = {row: _table6_row(found, *TABLE6_ROWS[row]) for row in paper.rows}
        if models.get(model) == TABLE6_MODEL:
            ours = rows
        else:
            others += [(f"{row}, {model}", row_cells) for row, row_cells in rows.items()]
        notes.append(f"{model}: {found['test_questions']} test questions, {found['summary'][0]['seeds']} seeds.")
        if not all(rows.values()):
            notes.append(f"{path.relative_to(results)} has no accuracy by group; run its command again to have it.")
    rows = [
        [row, *(beside(known[c], ours.get(row, {}).get(c), 100) for c in paper.columns)]
        for row, known in paper.rows.items()
    ]
    rows += [[row, *(beside(None, cells.get(column), 100) for column in paper.columns)] for row, cells in others]
    notes.append("± is one standard deviation over training seeds. The paper's rows are of LLaMA-3.2-3B-Instruct.")
    return Document(6, [("", (["", *paper.columns], rows))], notes, [found.get("command") for _, found in ablations])


def _table6_row(found: dict[str, Any], setting: str, measure: str) -> dict[str, Estimate]:
    """Column -> accuracy over seeds of one setting; empty for files of older versions."""
    (row,) = [row for row in found["summary"] if row["setting"] == setting]
    cells = {}
    for column in ("ARC", "DART"):
        value = row.get(f"{measure}_{column.lower()}")
        if value is not None:
            cells[column] = Estimate(value["mean"], value["std"], found["test_questions"])
    return cells


def write_paper_tables(results: Path, output: Path) -> list[Path]:
    """Writes table2 to table6 (.md and .tex) into `output` from everything below `results`; returns the .md files.

    Raises:
        UserError: a file of results is damaged.
    """
    evaluations = find_evaluations(results)
    documents = [
        table2(evaluations),
        table3(evaluations),
        table4(evaluations),
        table5(evaluations),
        table6(results),
    ]
    return [document.write(output) for document in documents]
