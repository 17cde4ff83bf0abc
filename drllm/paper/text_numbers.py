"""Numbers of the paper's text beside ours: one column per base model, a folder of results/ each."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.evaluation.results import ROUTER, Run
from drllm.files import read_json, write_whole
from drllm.manifests import CHECKPOINT_MANIFEST, PROGRAM
from drllm.paper.result_files import WRITE_AGAIN, experiment_files, reading_result
from drllm.text_tables import markdown

TEXT_FILE = Path(__file__).with_name("paper_text.json")
NAME = "text.md"
BESIDE = ("training.json", "label_counts.json", ROUTER)  # what may be beside a manifest


@dataclass(frozen=True)
class Found:
    """The files of one base model that numbers are read from.

    Attributes:
        search: manifest of the labels of a published search.
        folder: where it is; beside it may be label_counts.json, training.json and runs of eval.sh.
        experiments: content of the JSON files of programs, by path.
    """

    search: dict[str, Any] | None
    folder: Path
    experiments: list[tuple[Path, dict[str, Any]]]

    @classmethod
    def of(cls, folder: Path) -> Found:
        """The published search below `folder` that has most beside it, all experiments, and those of results/speed."""

        def rank(path: Path) -> tuple[int, int, Path]:
            return -sum((path.parent / name).exists() for name in BESIDE), len(path.parts), path

        for path in sorted(folder.rglob(CHECKPOINT_MANIFEST), key=rank):
            record = read_json(path, WRITE_AGAIN, object)
            if isinstance(record, dict) and record.get("program", PROGRAM) == PROGRAM and record.get("table2"):
                speed = folder.parent / "speed"
                others = experiment_files(speed) if speed.is_dir() else ()
                timed = [item for item in others if item[1].get("num_blocks") == record["num_layers"]]
                return cls(record, path.parent, [*experiment_files(folder), *timed])
        return cls(None, folder, [])

    def total(self, count: str) -> int | None:
        """The sum of a count over the sets of the search."""
        return None if self.search is None else sum(row[count] for row in self.search["table2"])

    def beside(self, name: str) -> dict[str, Any] | None:
        """A JSON file beside the manifest, None when it is not there."""
        path = self.folder / name
        return read_json(path, WRITE_AGAIN) if path.is_file() else None

    def ablation(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        """Setting -> summary over seeds and runs of an ablation; empty when it was not run."""
        for _, content in self.experiments:
            if content.get("ablation") == name:
                runs: dict[str, list[Any]] = {}
                for run in content["runs"]:
                    runs.setdefault(run["setting"], []).append(run)
                return {row["setting"]: row | {"runs": runs[row["setting"]]} for row in content["summary"]}
        return {}


def visited(found: Found) -> str | None:
    count = found.total("visited")
    return None if count is None else f"{count:,}"


def labels(found: Found) -> str | None:
    count = found.total("sampled")
    return None if count is None else f"{count:,}"


def wrong_to_right(found: Found) -> str | None:
    count = found.total("wrong_to_right")
    return None if count is None else f"{100 * count / max(1, found.total('sampled') or 0):.1f}"


def layers_saved(found: Found) -> str | None:
    if found.search is None:
        return None
    rows = found.search["table2"]
    return f"{sum(row['layers_saved'] * row['sampled'] for row in rows) / sum(row['sampled'] for row in rows):.2f}"


def class_counts(found: Found) -> str | None:
    if (training := found.beside("training.json")) is not None:
        return ", ".join(f"{count:,}" for count in training["class_counts"]) + " (training part)"
    counts = found.beside("label_counts.json")
    return None if counts is None else ", ".join(f"{sum(column):,}" for column in zip(*counts.values(), strict=True))


def shares(found: Found) -> str | None:
    if not (found.folder / ROUTER / "run.json").is_file():
        return None
    run = Run(found.folder / ROUTER)
    return " and ".join(f"{100 * run.share(sorted(run.tasks), action):.1f}" for action in (0, 2))


def macro_f1(found: Found) -> str | None:
    if (training := found.beside("training.json")) is not None:
        return f"{100 * training['metrics']['macro_f1']:.1f}"
    focal = found.ablation("figure7").get("focal")
    return None if focal is None else f"{100 * focal['macro_f1']['mean']:.1f}"


def layer_accuracy(found: Found) -> str | None:
    training = found.beside("training.json")
    return None if training is None else f"{100 * training['metrics']['acc']:.1f}"


def training_time(found: Found) -> str | None:
    training = found.beside("training.json")
    return None if training is None else f"{training['seconds']:.0f} s on a CPU"


def latency(found: Found) -> str | None:
    for _, content in found.experiments:
        rows = [row for row in content.get("rows", []) if isinstance(row, dict) and row.get("router_s") is not None]
        if rows and rows[0].get("skips") and content["arguments"]["model"]:
            seconds = ", ".join(f"{rows[0][name]:.2f}" for name in ("stock_total_s", "routed_total_s", "router_s"))
            skips, where = rows[0]["skips"], content["machine"]["gpus"] or "one CPU core"
            return f"{seconds} ({content['arguments']['new_tokens']:,} tokens, {skips} blocks skipped, {where})"
    return None


def _between(first: str, second: str, name: str, found: Found) -> str | None:
    """The difference in accuracy of two settings of an ablation, mean ± standard deviation over seeds."""
    settings = found.ablation(name)
    if not {first, second} <= settings.keys():
        return None
    by_seed = [{run["seed"]: run["accuracy"] for run in settings[setting]["runs"]} for setting in (first, second)]
    differences = [100 * (by_seed[0][seed] - by_seed[1][seed]) for seed in by_seed[0].keys() & by_seed[1].keys()]
    spread = f" ± {statistics.stdev(differences):.1f}" if len(differences) > 1 else ""
    return f"{statistics.mean(differences):+.1f}{spread}"


def _over_windows(metric: str, found: Found) -> str | None:
    """A metric of the last epoch at 1 and at 8 windows, mean over seeds."""
    settings = found.ablation("figure8")
    if not {"1", "8"} <= settings.keys():
        return None
    values = [statistics.mean(run["history"][-1][metric] for run in settings[name]["runs"]) for name in ("1", "8")]
    return f"{values[0]:.2f} to {values[1]:.2f}"


def _rule(rule: str, count: str, found: Found) -> str | None:
    """The change in percent of a count of the search under another rule, per draw of labels (runs/search_rules.sh)."""
    counts: dict[str, list[float]] = {}
    for path, content in found.experiments:
        if path.parent.name == "search_rules" and "rows" in content and path.stem == "labels":
            for row in content["rows"]:
                name, _, seed = Path(row["labels"]).name.rpartition("-")
                counts.setdefault(name, [])
                if (place := int(seed)) >= len(counts[name]):
                    counts[name] += [0.0] * (place + 1 - len(counts[name]))
                counts[name][place] += row[count]
    if not {rule, "algorithm-1"} <= counts.keys():
        return None
    changes = [100 * (new / old - 1) for new, old in zip(counts[rule], counts["algorithm-1"], strict=True)]
    spread = f" ± {statistics.stdev(changes):.1f}" if len(changes) > 1 else ""
    return f"{statistics.mean(changes):+.1f}{spread}"


MEASURES: dict[str, Callable[[Found], str | None]] = {
    function.__name__: function
    for function in (
        visited, labels, wrong_to_right, layers_saved, class_counts, shares, macro_f1, layer_accuracy, training_time,
        latency,
    )
} | {
    "teacher_forcing": functools.partial(_between, "on", "off", "teacher_forcing"),
    "focal_ce": functools.partial(_between, "focal", "ce", "figure7"),
    "focal_weighted": functools.partial(_between, "focal", "weighted_ce", "figure7"),
    "windows_skip": functools.partial(_over_windows, "acc_skip"),
    "windows_repeat": functools.partial(_over_windows, "acc_repeat"),
    "windows_f1": functools.partial(_over_windows, "macro_f1"),
    "lambda_visited": functools.partial(_rule, "lambda-5", "visited"),
    "lambda_inferences": functools.partial(_rule, "lambda-5", "inferences"),
    "any_gain_inferences": functools.partial(_rule, "any-gain", "inferences"),
}  # fmt: skip


def text_numbers() -> list[dict[str, Any]]:
    """The numbers of the paper's text: what, paper, measure, reason."""
    return json.loads(TEXT_FILE.read_text())["numbers"]


def text_table(bases: Sequence[tuple[str, Found]]) -> str:
    """The table "paper | here", one column per base, with the reason where a base has no number."""
    rows = []
    for number in text_numbers():
        cells = []
        for name, found in bases:
            with reading_result(found.folder / name):
                measured = MEASURES[number["measure"]](found) if number["measure"] else None
            cells.append(measured or f"not measured: {number['reason']}")
        rows.append([number["what"], number["paper"], *cells])
    return markdown(["number of the text", "paper", *(name for name, _ in bases)], rows)


def write_text_table(results: Path, output: Path) -> Path | None:
    """Writes text.md into `output`; None when no folder of `results` has a published search.

    Raises:
        UserError: a file of results is damaged.
    """
    folders = sorted(path for path in results.iterdir() if path.is_dir() and path != output)
    bases = [(folder.name, found) for folder in folders if (found := Found.of(folder)).search is not None]
    if not bases:
        return None
    origins = "\n".join(f"* {name}: {found.folder.relative_to(results)}" for name, found in bases)
    intro = (
        "Numbers of the paper's text (`drllm/paper/paper_text.json`), beside ours as published, one column per base."
    )
    notes = "± is one standard deviation over training seeds, or over draws of labels for rules of the search."
    text = f"{intro}\n\n{text_table(bases)}\n\n{notes} Labels and routers of each column:\n\n{origins}\n"
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / NAME, text)
    return output / NAME
