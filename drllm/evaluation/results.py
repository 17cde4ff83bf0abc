"""What eval.sh wrote, read back: runs, their scores and layers per query, with standard errors.

A folder of eval.sh has one subfolder per run (see `drllm.evaluation.eval_sh`); `load_runs` reads them. Tables and
figures are built on this module; it does not depend on them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import UserError
from drllm.evaluation.protocol import is_likelihood
from drllm.files import read_json
from drllm.questions.sets import GROUPS, SETS
from drllm.rollouts.rewards import PUBLISHED, reward_named
from drllm.schema import INTEGER, LIST, NUMBER, OBJECT, TEXT, Schema, check_fields, each, or_null

BASE, ROUTER = "base", "router"
BENCHMARKS_FILE = Path(__file__).resolve().parents[2] / "eval_tasks" / "benchmarks.json"
# For tasks that are not a benchmark of the paper: the primary metric, first match.
METRICS = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none", "f1,none")
RUN_AGAIN = "delete the folder of this run and run eval.sh again"


def task_name(set_name: str) -> str:
    """lm-eval's name of an in-domain set: "drllm_dart_1" for "dart-1"."""
    return "drllm_" + set_name.replace("-", "_")


def benchmarks() -> list[dict[str, Any]]:
    """The paper's benchmarks: paper, tables, task, metric, shots, max_new_tokens."""
    return json.loads(BENCHMARKS_FILE.read_text())["benchmarks"]


def has_unweighted_score(task: str) -> bool:
    """Whether the score of a group is the mean over its subtasks, whatever their numbers of questions (AGIEval)."""
    return any(row["task"] == task and row.get("average") == "subtasks" for row in benchmarks())


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over `count` queries (None for one query)."""

    mean: float
    stderr: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate | None:
        """Mean and standard error of `values`, None for no values."""
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
        """The estimate over all queries of `parts`: equal to `of` over all their values."""
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
    def equally_weighted(cls, parts: Sequence[Estimate | None]) -> Estimate | None:
        """The mean of `parts`, each with the same weight regardless of its number of queries.

        The parts are estimates over different queries, so their errors are independent. None when a part is missing.
        """
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts):
            return None
        errors = [part.stderr for part in known if part.stderr is not None]
        stderr = math.hypot(*errors) / len(known) if len(errors) == len(known) else None
        return cls(statistics.mean(part.mean for part in known), stderr, sum(part.count for part in known))

    @classmethod
    def over_checkpoints(cls, estimates: Sequence[Estimate | None]) -> Estimate | None:
        """The mean over checkpoints that were evaluated on the same questions.

        Its standard error over questions is at most the mean of theirs, which is what is returned.
        """
        mean = cls.equally_weighted(estimates)
        if mean is None:
            return None
        errors = [estimate.stderr for estimate in estimates if estimate is not None and estimate.stderr is not None]
        stderr = None if mean.stderr is None else statistics.mean(errors)
        return cls(mean.mean, stderr, mean.count // len(estimates))


# What tables and figures read in results.json, in its "config" and in that's "block_applications" of a task.
RESULTS: Schema = {
    "results": each(OBJECT),
    "config": OBJECT,
    "n-samples": each((lambda value: type(value) is dict and INTEGER[0](value.get("effective")), '"effective"')),
    "group_subtasks": each(each(TEXT, list)),
}
CONFIG: Schema = {
    "routing": (
        lambda value: type(value) is dict and INTEGER[0](value.get("num_blocks")),
        'an object with "num_blocks"',
    ),
    "model_dtype": TEXT,
    "model_fingerprint": TEXT,
    "block_applications": each(OBJECT),
}
COUNTS: Schema = {
    "queries": INTEGER,
    "blocks_per_query": NUMBER,
    "blocks_per_query_stderr": or_null(NUMBER),
    "share": each(NUMBER),
    "share_per_block": each(LIST),
}
QUERY: Schema = {"task": TEXT, "doc_id": INTEGER, "blocks": INTEGER, "paths": LIST}


def _check_results(path: Path, results: dict[str, Any]) -> None:
    """Raises UserError, with file and field, unless results.json has what tables and figures read."""
    results.setdefault("group_subtasks", {})
    check_fields(results, RESULTS, path, RUN_AGAIN)
    results["config"].setdefault("block_applications", {})
    check_fields(results["config"], CONFIG, path, RUN_AGAIN)
    for task, counts in results["config"]["block_applications"].items():
        check_fields(counts, COUNTS, f"{path}, {task}", RUN_AGAIN, may_lack=COUNTS)


def _json_lines(path: Path, schema: Schema) -> Iterator[dict[str, Any]]:
    """The object of each line; UserError on a line that is none, or not as `schema` says."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {RUN_AGAIN}") from None
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}); {RUN_AGAIN}") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object; {RUN_AGAIN}")
        check_fields(record, schema, where, RUN_AGAIN)
        yield record


class Run:
    """One lm-eval run of eval.sh.

    Attributes:
        name: "base", "router", "router-2", ... (of further checkpoints) or "path-...".
        results: lm-eval's results JSON.
        record: what was run, see `drllm.evaluation.eval_sh`.
        correct: task -> document -> primary metric, for tasks that log one number per document.
        queries: task -> document -> {"blocks", "passes", "paths"}.
        tasks: all tasks that layers were counted for.

    Checked-in results come without samples/ and queries.jsonl. Then `correct` and `queries` are empty, and means and
    standard errors are pooled from those of the tasks.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the run in `folder`.

        Raises:
            UserError: a file is missing or damaged; the message names it, and the field.
        """
        self.name = folder.name
        results_file, record_file = folder / "results.json", folder / "run.json"
        self.results: dict[str, Any] = read_json(results_file, RUN_AGAIN)
        self.record: dict[str, Any] = read_json(record_file, RUN_AGAIN)
        _check_results(results_file, self.results)
        self._file = results_file
        check_fields(self.record, {"run": OBJECT}, record_file, RUN_AGAIN)
        check_fields(self.record["run"], {"tasks": TEXT}, record_file, RUN_AGAIN)
        self.queries: dict[str, dict[int, dict[str, Any]]] = {}
        log = folder / "queries.jsonl"
        for query in _json_lines(log, QUERY) if log.is_file() else ():
            self.queries.setdefault(query["task"], {})[query["doc_id"]] = query
        self._counted: dict[str, Any] = self.results["config"]["block_applications"]
        self.tasks = set(self.queries) or set(self._counted)
        self.correct: dict[str, dict[int, float]] = {}
        for path in sorted((folder / "samples").glob("*.jsonl")):
            self.correct[path.stem] = self._read_samples(path)
        for task, queries in self.queries.items():
            total = self._counted.get(task, {}).get("queries", len(queries))
            if len(queries) != total:
                raise UserError(f"{log} has {len(queries)} of {total} queries of {task}; {RUN_AGAIN}")

    def _read_samples(self, path: Path) -> dict[int, float]:
        metric = self.metric(path.stem)
        if metric is None:
            return {}
        name, _, chosen_filter = metric.partition(",")
        correct, documents = {}, set()
        for sample in _json_lines(path, {"doc_id": INTEGER}):
            documents.add(sample["doc_id"])
            if sample.get("filter", "none") == chosen_filter and isinstance(sample.get(name), int | float):
                correct[sample["doc_id"]] = float(sample[name])
        total = self.results["n-samples"].get(path.stem, {}).get("effective", len(documents))
        if len(documents) != total:
            raise UserError(f"{path} has {len(documents)} of {total} documents; {RUN_AGAIN}")
        return correct

    def metric(self, task: str) -> str | None:
        """The key of the task's primary metric, e.g. "acc,none"."""
        scores = self.results["results"].get(task, {})
        paper = [benchmark["metric"] for benchmark in benchmarks() if benchmark["task"] == task]
        if is_likelihood(task):  # the metric that the labels were searched with
            paper = [reward_named(self.record["run"].get("reward", PUBLISHED)).metric]
        return next((metric for metric in (*paper, *METRICS) if metric in scores), None)

    def leaves(self, task: str) -> list[str]:
        """The tasks that were run under the name `task`: the task itself, or those of a group, recursively."""
        children = self.results["group_subtasks"].get(task, [])
        return [leaf for child in children if child != task for leaf in self.leaves(child)] or [task]

    def score(self, task: str) -> Estimate | None:
        """The primary metric of a task or group as lm-eval reports it, None when it was not run.

        A benchmark with `"average": "subtasks"` (AGIEval) has the unweighted mean over its subtasks, each by its own
        primary metric; the standard error takes the subtasks as independent.
        """
        subtasks = [leaf for leaf in self.leaves(task) if leaf != task]
        if subtasks and has_unweighted_score(task):
            return Estimate.equally_weighted([self.score(leaf) for leaf in subtasks])
        return self.reported(task)

    def reported(self, task: str) -> Estimate | None:
        """The primary metric as lm-eval reports it, which weighs the subtasks of a group by their questions."""
        metric = self.metric(task)
        if metric is None:
            return None
        scores, (name, _, chosen_filter) = self.results["results"][task], metric.partition(",")
        stderr = scores.get(f"{name}_stderr,{chosen_filter}")
        samples = self.results["n-samples"]
        check_fields(samples, dict.fromkeys(self.leaves(task), OBJECT), self._file, RUN_AGAIN)
        check_fields(scores, {metric: NUMBER}, self._file, RUN_AGAIN)
        count = sum(samples[leaf]["effective"] for leaf in self.leaves(task))
        return Estimate(scores[metric], stderr if isinstance(stderr, float) else None, count)

    def accuracy(self, tasks: Sequence[str]) -> Estimate | None:
        """The mean over all questions of `tasks`, each with the same weight."""
        if not self.correct:
            return Estimate.pooled(self.score(task) for task in tasks)
        return Estimate.of(value for task in tasks for value in self.correct.get(task, {}).values())

    def layers(self, tasks: Sequence[str]) -> Estimate | None:
        """Block applications per query ("num layers"), each query of `tasks` with the same weight."""
        if not self.queries:
            counts = [self._counted[task] for task in tasks if task in self._counted]
            return Estimate.pooled(
                Estimate(part["blocks_per_query"], part["blocks_per_query_stderr"], part["queries"]) for part in counts
            )
        return Estimate.of(query["blocks"] for task in tasks for query in self.queries.get(task, {}).values())

    def share_per_block(self, task: str) -> dict[str, list[float]]:
        """ "skip", "execute" and "repeat" -> share of queries, one number per block.

        Raises:
            UserError: the results do not have it.
        """
        check_fields(self._counted, {task: OBJECT}, self._file, RUN_AGAIN)
        check_fields(self._counted[task], {"share_per_block": OBJECT}, self._file, RUN_AGAIN)
        return self._counted[task]["share_per_block"]

    def share(self, tasks: Sequence[str], action: int) -> float:
        """Share of blocks skipped (0), executed (1) or repeated (2), over the queries of `tasks`."""
        if not self.queries:
            counts = [self._counted[task] for task in tasks if task in self._counted]
            shares = [part["queries"] * part["share"][("skip", "execute", "repeat")[action]] for part in counts]
            return sum(shares) / max(sum(part["queries"] for part in counts), 1)
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


def _unpaired(base: Estimate | None, other: Estimate | None) -> Estimate | None:
    """The difference of two means over the same queries, without an error: that needs the values by query."""
    if base is None or other is None:
        return None
    return Estimate(other.mean - base.mean, None, base.count)


def accuracy_difference(base: Run, other: Run, tasks: Sequence[str]) -> Estimate | None:
    """Accuracy of `other` minus that of `base`, paired by question where both logged their questions."""
    if not (base.correct and other.correct):
        return _unpaired(base.accuracy(tasks), other.accuracy(tasks))
    return _paired(base.correct, other.correct, tasks)


def layers_difference(base: Run, other: Run, tasks: Sequence[str]) -> Estimate | None:
    """Layers per query of `other` minus those of `base`, paired by query where both logged their queries."""
    if not (base.queries and other.queries):
        return _unpaired(base.layers(tasks), other.layers(tasks))
    of_base, of_other = (
        {task: {document: query["blocks"] for document, query in rows.items()} for task, rows in run.queries.items()}
        for run in (base, other)
    )
    return _paired(of_base, of_other, tasks)


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


def rows_of(run: Run) -> dict[str, list[str]]:
    """Row name -> tasks: one row per in-domain set; other tasks and groups as they were requested."""
    in_domain = {task_name(name) for name in SETS}
    rows: dict[str, list[str]] = {}
    for name in run.record["run"]["tasks"].split(","):
        leaves = [leaf for leaf in run.leaves(name) if leaf in run.tasks]
        if in_domain.issuperset(leaves):
            rows |= {leaf: [leaf] for leaf in leaves}
        else:
            rows[name] = leaves
    return rows


def task_order(task: str) -> tuple[int, str]:
    """Sort key: in-domain sets in the paper's order, then other tasks by name."""
    in_domain = [task_name(name) for sets in GROUPS.values() for name in sets]
    return (in_domain.index(task) if task in in_domain else len(in_domain), task)


def load_runs(folder: Path) -> list[Run]:
    """The complete runs below `folder`: base, router, those of further checkpoints, then static paths.

    Raises:
        UserError: the baseline or the routed run is missing, or not all were graded by one version of the graders.
    """
    further = sorted((path.name for path in folder.glob(f"{ROUTER}-*")), key=lambda name: (len(name), name))
    names = [BASE, ROUTER, *further, *sorted(path.name for path in folder.glob("path-*"))]
    runs = [Run(folder / name) for name in names if (folder / name / "run.json").is_file()]
    if [run.name for run in runs[:2]] != [BASE, ROUTER]:
        raise UserError(f"{folder} has no complete runs base and router; run eval.sh")
    versions = {run.name: run.record["run"].get("grader_version") for run in runs}
    if len(set(versions.values())) > 1:
        found = ", ".join(f"{name}: {version or 'not said'}" for name, version in versions.items())
        raise UserError(f"{folder}: its runs were graded by different grader_version ({found}); {RUN_AGAIN}")
    return runs
