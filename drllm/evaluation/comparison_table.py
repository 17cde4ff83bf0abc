"""The table of eval.sh: base, + router and their difference, by group of sets and by task."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from drllm.evaluation.protocol import describe_parts
from drllm.evaluation.results import (
    ROUTER,
    Estimate,
    Run,
    accuracy_difference,
    has_unweighted_score,
    in_domain_columns,
    layers_difference,
    load_runs,
    rows_of,
    task_order,
)
from drllm.files import write_whole
from drllm.text_tables import EMPTY, Table, latex, markdown, percent, with_error

# Tasks -> estimate over them; the argument of `mean_over_sets`.
Measure = Callable[[Sequence[str]], Estimate | None]
BY_QUESTION = "all questions"


def mean_over_sets(measure: Measure, tasks: Sequence[str]) -> Estimate | None:
    """The mean of `measure` over `tasks`, every set with the same weight, as in the paper.

    With all seven sets, Total is 2/7 ARC + 5/7 DART.
    """
    return Estimate.equally_weighted([measure([task]) for task in tasks])


def _columns(base: Run) -> list[tuple[str, list[str], bool]]:
    """(column, tasks, whether every set has the same weight), Total of the paper first.

    Weighing every question alike is shown only where the sets differ in size.
    """
    columns = [(name, tasks, True) for name, tasks in in_domain_columns(base).items()]
    tasks = columns[-1][1]
    if len({base.layers([task]).count for task in tasks}) > 1:
        columns.append((BY_QUESTION, tasks, False))
    return columns


def _header(base: Run) -> list[str]:
    return ["", *(f"{name} {what}" for name, _, _ in _columns(base) for what in ("acc. (%)", "layers"))]


def _cells(base: Run, accuracy: Measure, layers: Measure, signed: bool) -> list[str]:
    cells = []
    for _, tasks, by_set in _columns(base):
        for measure, scale in ((accuracy, 100), (layers, 1)):
            estimate = mean_over_sets(measure, tasks) if by_set else measure(tasks)
            cells.append(with_error(estimate, scale, signed=signed))
    return cells


def table3(runs: Sequence[Run]) -> Table:
    """(header, rows) in the form of Table 3: accuracy and num layers of base, + router and their difference.

    Args:
        runs: the base run first. In-domain tasks must have been run.
    """
    base, rows = runs[0], []
    for run in runs:
        label = "base" if run is base else "+ " + run.name
        if run.name.startswith("path-"):
            label = "static path " + run.name.removeprefix("path-")
        rows.append([label, *_cells(base, run.accuracy, run.layers, signed=False)])
        if run is not base:
            differences = (partial(difference, base, run) for difference in (accuracy_difference, layers_difference))
            rows.append(["difference", *_cells(base, *differences, signed=True)])
    return _header(base), rows


def table3_over_seeds(base: Run, routers: Sequence[Run]) -> Table:
    """(header, rows) as `table3`, with the mean and standard deviation over the checkpoints of several seeds."""
    rows = [["base"], [f"+ router, {len(routers)} seeds"], ["difference"]]
    for _, tasks, by_set in _columns(base):
        for name, scale in (("accuracy", 100), ("layers", 1)):
            means = []
            for run in (base, *routers):
                measure: Measure = getattr(run, name)
                means.append(scale * (mean_over_sets(measure, tasks) if by_set else measure(tasks)).mean)
            before, after = means[0], means[1:]
            mean, spread = statistics.mean(after), statistics.stdev(after)
            rows[0].append(f"{before:.2f}")
            rows[1].append(f"{mean:.2f} ± {spread:.2f}")
            rows[2].append(f"{mean - before:+.2f} ± {spread:.2f}")
    return _header(base), rows


def detail(base: Run, router: Run) -> Table:
    """(header, rows) by task: score, layers, answers that changed, and shares of skipped and repeated blocks.

    Groups of tasks that are not in-domain (mmlu, agieval) get one row.
    """
    header = ["task", "questions", "base score (%)", "router score (%)", "difference", "fixed", "broken"]
    header += ["base layers", "router layers", "difference", "skipped (%)", "repeated (%)"]
    rows = []
    for name, tasks in sorted(rows_of(base).items(), key=lambda item: task_order(item[0])):
        pairs = [
            (before, router.correct[task][document])
            for task in tasks
            for document, before in base.correct.get(task, {}).items()
            if document in router.correct.get(task, {})
        ]
        changes = [sum(after > before for before, after in pairs), sum(after < before for before, after in pairs)]
        rows.append(
            [
                name.removeprefix("drllm_"),
                str(base.layers(tasks).count),
                percent(base.score(name)),
                percent(router.score(name)),
                percent(accuracy_difference(base, router, tasks), signed=True),
                *(map(str, changes) if pairs else [EMPTY, EMPTY]),
                with_error(base.layers(tasks)),
                with_error(router.layers(tasks)),
                with_error(layers_difference(base, router, tasks), signed=True),
                f"{100 * router.share(tasks, 0):.1f}",
                f"{100 * router.share(tasks, 2):.1f}",
            ]
        )
    return header, rows


def _notes(base: Run, router: Run) -> list[str]:
    counts = {name: base.layers(tasks).count for name, tasks in in_domain_columns(base).items()}
    settings = router.results["config"]["routing"]
    notes = []
    if counts:
        notes.append("Questions: " + ", ".join(f"{name} {count}" for name, count in counts.items()) + ".")
        weights = "ARC, DART and Total are means over their sets, every set with the same weight as in the paper"
        if any(name == BY_QUESTION for name, _, _ in _columns(base)):
            weights += f'; "{BY_QUESTION}" gives every question the same weight'
        notes.append(weights + ".")
    notes += [
        "± is one standard error; for differences, of the differences paired by question.",
        "Layers: block applications per query, counted and summed over its forward passes (prefill is one), "
        f"mean over queries; {settings['num_blocks']} blocks.",
        f"Routing: num_windows={settings.get('num_windows')}, routing_control={settings.get('routing_control')}; "
        f"dtype {router.results['config']['model_dtype']}; "
        f"base weights {router.results['config']['model_fingerprint']}.",
    ]
    notes += [
        f"{name}: every subtask has the same weight; weighed by their questions, as lm-eval does, base "
        f"{percent(base.reported(name))}, router {percent(router.reported(name))}."
        for name in filter(has_unweighted_score, rows_of(base))
    ]
    notes += describe_parts(router.record["run"].get("parts", []))
    if router.record["run"].get("limit") is not None:
        notes.append(f"Only the first {router.record['run']['limit']} questions of each task were evaluated.")
    return notes


def write_comparison(folder: Path) -> str:
    """Writes table.md and table.tex into `folder` from its runs and returns the Markdown.

    Raises:
        UserError: `folder` lacks a complete base or routed run, or a file of a run is damaged.
    """
    runs = load_runs(folder)
    base, router = runs[:2]
    routers = [run for run in runs if run.name.startswith(ROUTER)]
    is_in_domain = bool(in_domain_columns(base))
    parts, tex = [], []
    if is_in_domain and len(routers) > 1:
        header, rows = table3_over_seeds(base, routers)
        parts.append(markdown(header, rows) + "\n\nAbove, ± is one standard deviation over seeds; seed by seed:")
        tex.append(latex(header, rows))
    if is_in_domain:
        header, rows = table3(runs)
        parts.append(markdown(header, rows))
        tex.append(latex(header, rows))
    header, rows = detail(base, router)
    first = f"By task, the first of {len(routers)} checkpoints:\n\n" if len(routers) > 1 else ""
    parts.append(first + markdown(header, rows))
    tex.append(latex(header, rows))
    text = "\n\n".join([*parts, "\n".join(_notes(base, router))])
    command = (folder / "command.txt").read_text().strip()
    write_whole(folder / "table.md", f"{text}\n\nCommand:\n\n    {command}\n")
    write_whole(folder / "table.tex", "\n".join(tex))
    return text
