"""The table of benchmarks/gpu.sh: each figure beside its reference in the same run, its bound and what is wanted.

    python benchmarks/gpu_table.py results/gpu

Reads the JSON files of the folder, prints the table and writes it to README.md there, between its two marks. A figure
whose stage did not get that far says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drllm.errors import main_guard
from drllm.files import check_output_folder, read_json

BEGIN, END = "<!-- table of benchmarks/gpu_table.py -->", "<!-- end of the table -->"
HEADER = ("figure", "ours", "reference", "ratio", "bound", "share of the bound", "wanted")
MISSING = "not measured"
Cells = tuple[str, ...]


def search_rows(result: Mapping[str, Any]) -> list[Cells]:
    """The search against both references, with our choice of attention kernels and with torch's."""
    figures = next(iter(result["figures"].values()))
    rows = []
    for name, wanted in (("published", "at least 100"), ("plain", "at least 1.0")):
        for kernels, goal in (("", wanted), (", as torch chooses", "")):
            if (pairs := figures.get(f"engine_over_{name}{kernels}")) is None:
                continue
            unit = "simulations/s" if name == "published" else "rollouts/s"
            speed = 1 / statistics.median_high(pairs["seconds"])
            reference = 1 / statistics.median_high(pairs["reference_seconds"])
            title = f"search, {unit} over {'the published way' if name == 'published' else 'plain generation'}{kernels}"
            usable = " (unusable)" if pairs["problems"] else ""
            rows.append((title, f"{speed:.1f}", f"{reference:.1f}", f"{pairs['ratio']:.2f}{usable}", "", "", goal))
    rate, most = figures["block_operations_per_s"] / 1e12, figures["matrix_operations_per_s"] / 1e12
    share = f"{figures['share_of_matrix_rate']:.1%}"
    title = f"arithmetic of the blocks in the search at {figures['rows']} rows, TFLOP/s"
    rows.append((title, f"{rate:.1f}", "", "", f"{most:.0f}", share, "at least 30%"))
    if (captures := figures.get("captures")) is not None:
        used = "refused: steps were launched one by one" if figures["captures_refused"] else str(captures)
        rows.append(("captured decoding steps of the search", used, "", "", "", "", ""))
    if grading := figures["grading"]:
        title = f"grading, ms per answer ({grading['answers']} answers)"
        rows.append((title, f"{grading['ms_per_answer']:.2f}", "", "", "", "", ""))
        title = "share of the time that the device waits for grades"
        rows.append((title, f"{grading['share_waiting']:.1%}", "", "", "", "", ""))
    return rows


def decode_rows(result: Mapping[str, Any]) -> list[Cells]:
    """Decoding from graphs beside the stock model and the bandwidth, and captures over many paths."""
    rows, made = [], {(row["batch_size"], row["mode"], row["rows"]): row for row in result["rows"]}
    for (batch, mode, paths), row in made.items():
        if mode in ("graphs", "compiled") and paths in ("default", "shared"):
            ms, bound = row["ms_per_token"], row["bound_ms"]
            stock = made.get((batch, "stock", "default"), {}).get("ms_per_token")
            compared = ("", "") if stock is None else (f"{stock:.2f}", f"{stock / ms:.2f}")
            title = f"decoding, batch {batch}, {mode}, {paths} path, ms per token"
            goal = "at most 2 x the bound" if batch == 1 else ""
            rows.append((title, f"{ms:.2f}", *compared, f"{bound:.2f}", f"{ms / bound:.2f} x", goal))
            if (saved := row.get("decode_saved_over_blocks")) is not None:
                title = f"time saved over blocks saved, batch {batch}, {mode}"
                rows.append((title, f"{saved:.2f}", "", "", "1", f"{saved:.0%}", "at least 0.95"))
    if many := result.get("many_paths"):
        captures = str(many["captures_after_the_first"] + many["compilations_after_the_first"])
        rows.append(("captures and compilations over many paths, after the first", captures, "", "", "0", "", "0"))
    return rows


def training_rows(result: Mapping[str, Any]) -> list[Cells]:
    """Router training beside the paper's four hours."""
    seconds = [result.get(name) for name in ("pass_seconds", "epochs_seconds")]
    total = sum(part for part in seconds if part is not None)
    paper = (result.get("paper") or {}).get("seconds", 4 * 3600)
    parts = ", ".join(MISSING if part is None else f"{part:.0f}" for part in seconds)
    title = f"training on {result['questions']} labels, s (pass and epochs: {parts})"
    ratio = f"{paper / total:.1f}" if total else ""
    rows = [(title, f"{total:.0f}", f"{paper} (the paper's)", ratio, "", "", "at most 600")]
    if (peak := result.get("card_peak_over_weights")) is not None:
        rows.append(("its peak memory over the weights", f"{peak:.2f}", "", "", "1", "", "at most 1.2"))
    return rows


def evaluation_rows(result: Mapping[str, Any]) -> list[Cells]:
    """lm-eval's `drllm` beside its `hf`."""
    rows = []
    for one in result["figures"]:
        usable = " (unusable)" if one.get("problems") else ""
        goal = "at least 10" if "64" in one["name"] and "option" in one["name"] else ""
        seconds = (f"{1000 * one[f'{side}_seconds']:.1f}" for side in ("ours", "reference"))
        title, ratio = f"evaluation, {one['name']}, ms per question", f"{one['ratio']:.2f}{usable}"
        rows.append((title, *seconds, ratio, "", "", goal))
    return rows


def correctness_rows(path: Path) -> list[Cells]:
    """How many tests of `make test-gpu` passed."""
    suite = next(ElementTree.parse(path).iter("testsuite"))
    tests, wrong = int(suite.get("tests", 0)), int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return [("tests on the card (make test-gpu) that pass", f"{tests - wrong} of {tests}", "", "", "", "", "all")]


STAGES: dict[str, tuple[str, Callable[[Any], list[Cells]]]] = {
    "search": ("search_speed_*.json", search_rows),
    "decode": ("decode.json", decode_rows),
    "training": ("training.json", training_rows),
    "evaluation": ("evaluation.json", evaluation_rows),
}


def table_of(folder: Path) -> str:
    """The table of the files in `folder` as Markdown, with the machine that made them below it."""
    tests = folder / "correctness.xml"
    rows = correctness_rows(tests) if tests.exists() else [("tests on the card", MISSING, "", "", "", "", "all")]
    made = set()
    for stage, (pattern, rows_of) in STAGES.items():
        files = sorted(folder.glob(pattern))
        for path in files:
            result = read_json(path, "run its stage of benchmarks/gpu.sh again")
            gpus = ", ".join(result["machine"]["gpus"]) or "no GPU: these are no figures of speed"
            made.add(f"{gpus}; torch {result['versions'].get('torch')}; commit {result['commit']}")
            rows += rows_of(result)
        if not files:
            rows.append((stage, MISSING, "", "", "", "", ""))
    lines = [HEADER, ("---",) * len(HEADER), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "".join(f"\n\n{one}" for one in sorted(made))


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="OUTPUT_FOLDER of benchmarks/gpu.sh")
    args = parser.parse_args(argv)
    check_output_folder(args.folder, "folder")
    table, page = table_of(args.folder), args.folder / "README.md"
    print(table)
    text = page.read_text() if page.exists() else f"# Figures of one GPU\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    raise SystemExit(main())
