"""Tables from results: what eval.sh prints, and the paper's Tables 2 to 6 with the paper's figures beside ours.

    python -m drllm.tables results/            # all folders of eval.sh below it -> results/tables/

The paper's figures are data (`paper.json`), its benchmarks are, too (`eval_tasks/benchmarks.json`).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import UserError, main_guard
from drllm.evaluation.runs import (
    ROUTER,
    Estimate,
    Run,
    accuracy_difference,
    benchmarks,
    in_domain_columns,
    layers_difference,
    load_runs,
    rows_of,
    task_order,
)
from drllm.questions.sets import GROUPS

PAPER_FILE = Path(__file__).with_name("paper.json")


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
    for name, tasks in sorted(rows_of(base).items(), key=lambda item: task_order(item[0])):
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
