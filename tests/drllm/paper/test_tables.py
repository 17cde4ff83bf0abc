"""The paper's tables: every number of the paper at its place, ours beside it, and what was not run said so."""

import json
from pathlib import Path

import pytest

from drllm.paper.numbers import PAPER_FILE, paper_models, paper_table
from drllm.paper.tables import write_paper_tables
from tests.eval_toys import make_run

RESULTS = Path(__file__).parents[3] / "results"


def read_table(path):
    """(header, rows) of the first table in a Markdown file, cells as text."""
    lines = path.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table[0], table[2:]


def cells_of(path, *beginning):
    """The cells of the row that begins with `beginning`, by column."""
    header, rows = read_table(path)
    (row,) = [row for row in rows if row[: len(beginning)] == list(beginning)]
    return dict(zip(header, row, strict=True))


def paper_rows(number):
    """(names at the beginning of the row, cells of the paper) of each row of a table in paper.json."""
    for name, row in paper_table(number).rows.items():
        if "base" in row:
            yield from (((name, label), row[label]) for label in ("base", "+ router"))
        else:
            yield (name,), row


@pytest.fixture
def no_results(tmp_path):
    write_paper_tables(tmp_path, tmp_path / "tables")
    return tmp_path / "tables"


@pytest.mark.parametrize("number", range(2, 7))
def test_every_number_of_the_paper_is_at_its_place(no_results, number):
    """In the row and column where the paper prints it: value, standard error and change."""
    path = no_results / f"table{number}.md"
    header, rows = read_table(path)
    assert header[-len(paper_table(number).columns) :] == paper_table(number).columns
    names = []
    for beginning, paper in paper_rows(number):
        names.append(beginning)
        shown = cells_of(path, *beginning)
        for column in paper_table(number).columns:
            if column not in paper:
                assert (column, beginning[1]) == ("Avg. Δ", "base")
                assert shown[column] == "–"
                continue
            cell, (left, *right) = paper[column], shown[column].split(" / ")
            assert right == ["not run"]
            value, *change = left.split(" (")
            value, *error = value.split(" ± ")
            assert value == cell.get("as_printed", str(cell["value"]))
            assert [float(part) for part in error] == ([cell["std"]] if "std" in cell else [])
            assert [float(part.strip(")")) for part in change] == ([cell["delta"]] if "delta" in cell else [])
    assert names == [tuple(row[: len(names[0])]) for row in rows]


def test_the_paper_has_its_numbers():
    """That paper.json itself is whole: counts of its numbers, and sums that hold between them."""
    counts = {}
    for number in range(2, 7):
        cells = [cell for _, row in paper_rows(number) for cell in row.values()]
        counts[number] = sum(len({"value", "std", "delta"} & cell.keys()) for cell in cells)
    assert counts == {2: 32, 3: 108, 4: 132, 5: 25, 6: 6}
    rows = paper_table(2).rows
    for column in ("Sampled", "Visited"):
        parts = [row[column]["value"] for name, row in rows.items() if name != "Total"]
        assert sum(parts) == rows["Total"][column]["value"]
    totals = [
        (row["Total Accuracy"]["value"], 2 / 7 * row["ARC Accuracy"]["value"] + 5 / 7 * row["DART Accuracy"]["value"])
        for _, row in paper_rows(3)
    ]
    assert sum(abs(printed - computed) < 0.06 for printed, computed in totals) == 11
    for (base, router), model in zip(
        zip(*[iter(row for _, row in paper_rows(4))] * 2, strict=True), paper_table(4).rows, strict=True
    ):
        mean = sum(router[column]["value"] - base[column]["value"] for column in base) / len(base)
        assert mean == pytest.approx(router["Avg. Δ"]["value"], abs=0.02), model
    for _, row in paper_rows(5):
        mean = sum(row[column]["value"] for column in paper_table(5).columns[:-1]) / 4
        assert mean == pytest.approx(row["Avg."]["value"], abs=0.1)
    named = {model["table4"] for model in paper_models() if "table4" in model}
    assert named == paper_table(4).rows.keys()
    assert [model["paper"] for model in paper_models()] == list(paper_table(3).rows)


def test_no_cell_is_unknown(no_results, tmp_path):
    write_paper_tables(RESULTS, tmp_path / "checked_in")
    for folder in (no_results, tmp_path / "checked_in"):
        for number in range(2, 7):
            for suffix in ("md", "tex"):
                assert "?" not in (folder / f"table{number}.{suffix}").read_text()
    assert "?" not in PAPER_FILE.read_text()


SETS = ["drllm_arc_easy", "drllm_arc_challenge", *(f"drllm_dart_{level}" for level in range(1, 6))]
BENCHMARKS = {
    "mmlu": "acc,none",
    "aime24": "exact_match,none",
    "truthfulqa_mc1": "acc,none",
    "gsm8k": "exact_match,strict-match",
    "squadv2": "f1,none",
    "gpqa_diamond_zeroshot": "acc_norm,none",
    "agieval": "acc,none",
    "piqa": "acc_norm,none",
    "hellaswag": "acc_norm,none",
    "humaneval": "pass@1,create_test",
}


def make_in_domain(folder, model, base_answers, router_answers, blocks):
    """Runs on all sets; ARC-E has four questions, the others two. Answers are 1 for the first so many of each set."""
    for name, answers, layers in (("base", base_answers, blocks[0]), ("router", router_answers, blocks[1])):
        correct = {task: [1.0] * answers + [0.0] * ((4 if task == SETS[0] else 2) - answers) for task in SETS}
        make_run(folder, name, correct, {task: [layers] * len(correct[task]) for task in SETS}, base_model=model)


def make_benchmarks(folder, model, tasks, scores):
    """Runs on `tasks` with these scores of base and router."""
    for name, score in zip(("base", "router"), scores, strict=True):
        run = make_run(
            folder, name, {task: [0, 1] for task in tasks}, {task: [8, 8] for task in tasks}, base_model=model
        )
        results = json.loads((run / "results.json").read_text())
        for task in tasks:
            metric, _, chosen = BENCHMARKS[task].partition(",")
            scale = 100 if task == "squadv2" else 1
            results["results"][task] = {
                f"{metric},{chosen}": scale * score,
                f"{metric}_stderr,{chosen}": scale * 0.0123,
            }
        (run / "results.json").write_text(json.dumps(results))


def test_table3_beside_ours(tmp_path):
    make_in_domain(tmp_path / "big", "meta-llama/Llama-3.2-3B", 1, 2, (100, 90))
    make_in_domain(tmp_path / "small" / "seed0", "miniature/model", 1, 1, (10, 10))
    write_paper_tables(tmp_path, tmp_path / "out")
    base = cells_of(tmp_path / "out" / "table3.md", "LLaMA-3B-Base", "base")
    routed = cells_of(tmp_path / "out" / "table3.md", "LLaMA-3B-Base", "+ router")
    # ARC-E 1 of 4 and ARC-C 1 of 2; every set has the same weight
    arc, total = (1 / 4 + 1 / 2) / 2, (1 / 4 + 6 * 1 / 2) / 7
    assert base["ARC Accuracy"].startswith(f"48.0 / {100 * arc:.1f} ± ")
    assert base["ARC Accuracy"].endswith(f" / {100 * arc - 48.0:+.1f}")
    assert base["Total Accuracy"].startswith(f"22.1 / {100 * total:.1f} ± ")
    assert base["Total Num Layers"] == "815.4 / 100.00 ± 0.00 / -715.40"
    change = 100 * ((2 / 4 + 6 * 1) / 7 - total)
    assert f"({change:+.1f}) / " in routed["Total Accuracy"]
    assert routed["Total Num Layers"] == "812.4 (-3.02) / 90.00 ± 0.00 (-10.00) / -722.40"
    other = cells_of(tmp_path / "out" / "table3.md", "small/seed0", "base")
    assert other["Total Num Layers"] == "– / 10.00 ± 0.00"
    assert cells_of(tmp_path / "out" / "table3.md", "Qwen-7B-Instruct", "base")["ARC Accuracy"] == "94.5 / not run"
    text = (tmp_path / "out" / "table3.md").read_text()
    assert "LLaMA-3B-Base: ARC 6 (2 sets), DART 10 (5 sets), Total 16 (7 sets)" in text
    assert "2.25 points is inside one interval" in text
    assert "./eval.sh checkpoint" in text
    assert "./eval.sh" not in (tmp_path / "out" / "table4.md").read_text()


def test_table3_shows_the_mean_over_checkpoints(tmp_path):
    make_in_domain(tmp_path, "meta-llama/Llama-3.2-3B", 1, 2, (100, 90))
    blocks = {task: [80] * 2 for task in SETS[1:]} | {SETS[0]: [80] * 4}
    make_run(tmp_path, "router-2", {task: [0.0] * len(blocks[task]) for task in SETS}, blocks)
    write_paper_tables(tmp_path, tmp_path / "out")
    cells = cells_of(tmp_path / "out" / "table3.md", "LLaMA-3B-Base", "+ router, 2 seeds")
    assert cells["Total Num Layers"] == "812.4 (-3.02) / 85.00 ± 0.00 (-15.00) / -727.40"


def test_tables_4_and_5_beside_ours(tmp_path):
    model = "meta-llama/Llama-3.1-8B-Instruct"
    make_benchmarks(tmp_path / "first", model, [*list(BENCHMARKS)[:6]], (0.5, 0.52))
    write_paper_tables(tmp_path, tmp_path / "out")
    routed = cells_of(tmp_path / "out" / "table4.md", "LLaMA8B", "+ router")
    assert routed["GSM8k"] == "74.9 ± 1.28 / 52.0 ± 1.2 / -22.9"
    assert routed["SQuADv2"] == "28.6 ± 0.35 / 52.0 ± 1.2 / +23.4"
    assert routed["PIQA"] == "79.2 ± 1.07 / not run"
    assert routed["Avg. Δ"] == "-0.7 / 2.00 (6 of 8 run)"
    # the rest in a folder of its own
    make_benchmarks(tmp_path / "second", model, [*list(BENCHMARKS)[6:]], (0.5, 0.4))
    make_benchmarks(tmp_path / "other", "miniature/model", ["piqa"], (0.5, 0.4))
    write_paper_tables(tmp_path, tmp_path / "out")
    routed = cells_of(tmp_path / "out" / "table4.md", "LLaMA8B", "+ router")
    assert routed["Avg. Δ"] == "-0.7 / -1.00 / -0.30"  # 6 times +2, twice -10
    assert cells_of(tmp_path / "out" / "table4.md", "LLaMA8B", "base")["PIQA"] == "80.9 ± 1.06 / 50.0 ± 1.2 / -30.9"
    assert cells_of(tmp_path / "out" / "table4.md", "other", "+ router")["PIQA"] == "– / 40.0 ± 1.2"
    ours = cells_of(tmp_path / "out" / "table5.md", "Dr.LLM")
    assert ours["HumanEval"] == "48.6 / 40.0 ± 1.2 / -8.6"
    assert ours["MMLU"] == "66.8 / 52.0 ± 1.2 / -14.8"
    assert ours["Avg."] == "67.4 / 46.0 ± 0.6 / -21.4"
    assert cells_of(tmp_path / "out" / "table5.md", "FlexiDepth")["Avg."] == "59.7 / not run"


@pytest.fixture
def manifest():
    names = ["arc_easy", "arc_challenge", *(f"dart-{level}" for level in range(1, 6))]
    counts = {"original": 2000, "sampled": 390, "wrong_to_right": 100, "visited": 1000, "inferences": 40000}
    arguments = {"dataset": names, "num_simulations": 9, "samples": {"arc_easy": 400}, "limit": None}
    table2 = [{"set": name, **counts} for name in names]
    return {"table2": table2, "arguments": arguments, "model": "m", "chat_template": False, "seed": 1}


def test_table2_beside_ours(tmp_path, manifest):
    for name in ("one", "two"):  # two evaluations share one search
        make_in_domain(tmp_path / name, "m", 1, 1, (8, 8))
        (tmp_path / name / "labels_manifest.json").write_text(json.dumps(manifest))
    write_paper_tables(tmp_path, tmp_path / "out")
    path = tmp_path / "out" / "table2.md"
    assert cells_of(path, "ARC-E") == {
        "": "ARC-E",
        "Original": "2.25k / 2,000 / -250",
        "Sampled": "400 / 390 / -10",
        "Visited": "2,090 / 1,000 / -1,090",
        "#Inferences": "82.6k / 40,000 / -42,600",
    }
    assert cells_of(path, "Total")["#Inferences"] == "961.0k / 280,000 / -681,000"
    text = path.read_text()
    assert text.count("Labels of m:") == 1
    assert "#Inferences / Visited of m: 40.0" in text
    assert "python data_generation.py --model m --dataset arc_easy,arc_challenge,dart-1" in text


def test_table6_beside_ours(tmp_path):
    def row(setting, accuracy):
        numbers = {"accuracy_arc": accuracy, "accuracy_dart": 0.3, "base_accuracy_arc": 0.7, "base_accuracy_dart": 0.2}
        return {"setting": setting, "seeds": 2} | {name: {"mean": mean, "std": 0.02} for name, mean in numbers.items()}

    summary = [row("previous_layer", 0.75), row("embeddings", 0.5)]
    result = {"ablation": "table6", "summary": summary, "test_questions": 70}
    for name, model in (("a", "meta-llama/Llama-3.2-3B-Instruct"), ("b", "miniature/model")):
        (tmp_path / name).mkdir()
        found = result | {
            "labels": {"model": model},
            "command": f"python -m experiments.ablations table6 --data {name}",
        }
        (tmp_path / name / "table6.json").write_text(json.dumps(found))
    (tmp_path / "old.json").write_text(json.dumps({"ablation": "figure7"}))
    write_paper_tables(tmp_path, tmp_path / "out")
    path = tmp_path / "out" / "table6.md"
    assert cells_of(path, "Prev. layer H_{i-1} (Dr.LLM)")["ARC"] == "74.5 / 75.0 ± 2.0 / +0.5"
    assert cells_of(path, "First layer H_1 (embeddings)")["DART"] == "30.0 / 30.0 ± 2.0 / +0.0"
    assert cells_of(path, "No routing (vanilla model)")["ARC"] == "73.5 / 70.0 ± 2.0 / -3.5"
    assert cells_of(path, "First layer H_1 (embeddings), miniature/model")["ARC"] == "– / 50.0 ± 2.0"
    assert "--data b" in path.read_text()


def test_the_checked_in_results_make_tables(tmp_path):
    write_paper_tables(RESULTS, tmp_path)
    row = cells_of(tmp_path / "table3.md", "miniature/demo", "+ router")
    # the demo's own table was made from the files by question
    own = cells_of(RESULTS / "miniature" / "demo" / "table.md", "+ router")["Total acc. (%)"]
    mean, _, error = own.partition(" ± ")
    assert row["Total Accuracy"].startswith(f"– / {float(mean):.1f} ± {float(error):.1f} (")
    for path in sorted(tmp_path.iterdir()):
        checked_in = (RESULTS / "tables" / path.name).read_text()
        assert checked_in == path.read_text(), f"{path.name} is stale: python -m experiments.paper_tables results"
