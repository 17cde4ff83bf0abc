import json
import math
from pathlib import Path

import pytest

from drllm.evaluation import tables
from drllm.evaluation.runs import in_domain_columns, load_runs
from tests.eval_toys import make_run


@pytest.fixture
def folder(tmp_path):
    make_run(
        tmp_path,
        "base",
        {"drllm_arc_easy": [1, 0, 1, 1], "drllm_dart_2": [0, 0]},
        {"drllm_arc_easy": [8, 8, 8, 8], "drllm_dart_2": [20, 12]},
    )
    make_run(
        tmp_path,
        "router",
        {"drllm_arc_easy": [1, 1, 0, 1], "drllm_dart_2": [1, 0]},
        {"drllm_arc_easy": [6, 8, 8, 10], "drllm_dart_2": [15, 12]},
        paths=("0112",),
    )
    return tmp_path


def test_numbers_are_those_computed_by_hand(folder):
    base, router = load_runs(folder)
    assert in_domain_columns(base) == {
        "ARC": ["drllm_arc_easy"],
        "DART": ["drllm_dart_2"],
        "Total": ["drllm_arc_easy", "drllm_dart_2"],
    }
    header, rows = tables.table3([base, router])
    assert header[1:] == [
        "ARC acc. (%)",
        "ARC layers",
        "DART acc. (%)",
        "DART layers",
        "Total acc. (%)",
        "Total layers",
    ]
    assert [row[0] for row in rows] == ["base", "+ router", "difference"]
    assert rows[0][1] == "75.00 ± 25.00"
    assert rows[0][3:5] == ["0.00 ± 0.00", "16.00 ± 4.00"]
    # differences by question: accuracy 0, +1, -1, 0, +1, 0; layers -2, 0, 0, +2, -5, 0
    total = [0, 1, -1, 0, 1, 0]
    mean = 1 / 6
    stderr = math.sqrt(sum((value - mean) ** 2 for value in total) / 5 / 6)
    assert rows[2][5] == f"{100 * mean:+.2f} ± {100 * stderr:.2f}"
    assert rows[2][2] == "+0.00 ± 0.82"
    assert rows[2][6].startswith("-0.83 ")


def test_detail_counts_what_changed_hands(folder):
    header, (arc, dart) = tables.detail(*load_runs(folder))
    assert arc[header.index("fixed")] == "1"
    assert arc[header.index("broken")] == "1"
    assert dart[header.index("fixed")] == "1"
    assert arc[header.index("skipped (%)")] == "25.0"
    assert arc[header.index("repeated (%)")] == "25.0"
    assert arc[header.index("questions")] == "4"


def test_markdown_and_latex_have_the_same_cells(folder):
    text = tables.write_comparison(folder)
    assert "Questions: ARC 4, DART 2, Total 6." in text
    tex = (folder / "table.tex").read_text()
    assert tex.count("\\\\") == 4 + 3
    assert "acc. (\\%)" in tex
    assert "$\\pm$" in tex
    assert "_easy" not in tex.replace("\\_easy", "")


def _mmlu(folder, name, anatomy, virology):
    """A run of a group of two tasks of different size."""
    correct = {"mmlu_anatomy": anatomy, "mmlu_virology": virology}
    run = make_run(folder, name, correct, {task: [4] * len(values) for task, values in correct.items()})
    results = json.loads((run / "results.json").read_text())
    values = anatomy + virology
    results["results"]["mmlu"] = {"acc,none": sum(values) / len(values), "acc_stderr,none": 0.1}
    results["group_subtasks"] = {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_anatomy", "mmlu_virology"]}
    (run / "results.json").write_text(json.dumps(results))
    (run / "run.json").write_text(json.dumps({"run": {"limit": None, "tasks": "mmlu"}}))


def test_a_group_of_tasks_is_one_row(tmp_path):
    _mmlu(tmp_path, "base", [1, 0], [0])
    _mmlu(tmp_path, "router", [1, 1], [0])
    header, rows = tables.detail(*load_runs(tmp_path))
    assert len(rows) == 1
    assert rows[0][:4] == ["mmlu", "3", "33.33 ± 10.00", "66.67 ± 10.00"]
    assert rows[0][4] == "+33.33 ± 33.33"
    assert rows[0][header.index("fixed")] == "1"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """results/ with one model of the paper and the miniature, and a paper of which some figures are known."""
    correct = {"drllm_arc_easy": [1, 0], "piqa": [1, 1, 0, 0]}
    blocks = {"drllm_arc_easy": [8, 10], "piqa": [4, 4, 4, 4]}
    for folder, base_model in (("big", "meta-llama/Llama-3.2-3B"), ("miniature/seed0", "miniature/model")):
        for name in ("base", "router"):
            make_run(tmp_path / folder, name, correct, blocks, base_model=base_model)
            results = json.loads((tmp_path / folder / name / "results.json").read_text())
            results["results"]["piqa"] = {"acc_norm,none": 0.5, "acc,none": 0.9}
            (tmp_path / folder / name / "results.json").write_text(json.dumps(results))
    table2 = [{"set": "arc_easy", "sampled": 390, "wrong_to_right": 100, "visited": 1000, "inferences": 40000}]
    arguments = {"dataset": ["arc_easy"], "num_simulations": 9, "samples": {"arc_easy": 400}, "limit": None}
    manifest = {"table2": table2, "arguments": arguments, "model": "m", "chat_template": False, "seed": 1}
    (tmp_path / "big" / "labels_manifest.json").write_text(json.dumps(manifest))
    summary = [{"setting": "embeddings", "accuracy": {"mean": 0.5, "std": 0.02}, "layers": {"mean": 9.0, "std": 0.0}}]
    ablation = {"summary": summary, "test_questions": 70, "command": "python -m drllm.ablations table6"}
    (tmp_path / "table6.json").write_text(json.dumps(ablation))
    paper = json.loads(tables.PAPER_FILE.read_text())
    paper["table3"] = {"LLaMA-3B-Base": {"+ router": {"ARC accuracy": 47.5}}}
    (tmp_path / "paper.json").write_text(json.dumps(paper))
    monkeypatch.setattr(tables, "PAPER_FILE", tmp_path / "paper.json")
    return tmp_path


def _cells(path, *beginning):
    """The cells of the row that begins with `beginning`, by column."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    (row,) = [row for row in rows if row[: len(beginning)] == list(beginning)]
    return dict(zip(header, row, strict=True))


def test_paper_tables_show_paper_ours_and_difference(results, capsys):
    assert tables.main([str(results), "--output", str(results / "out")]) == 0
    out = results / "out"
    routed = _cells(out / "table3.md", "LLaMA-3B-Base", "+ router")
    assert routed["ARC accuracy"] == "47.5 / 50.0 ± 50.0 (n=2) / +2.5"
    assert routed["ARC layers"] == "? / 9.00 ± 1.00 (n=2)"
    assert routed["DART accuracy"] == "? / not run"
    assert _cells(out / "table3.md", "Qwen-7B-Instruct", "base")["ARC accuracy"] == "? / not run"
    assert _cells(out / "table3.md", "miniature/seed0", "base")["ARC accuracy"] == "? / 50.0 ± 50.0 (n=2)"
    assert _cells(out / "table4.md", "LLaMA-3B-Base", "base")["PIQA"] == "? / 50.0 (n=4)"
    assert _cells(out / "table4.md", "LLaMA-3B-Base", "base")["MMLU"] == "? / not run"
    arc = _cells(out / "table2.md", "LLaMA-3B-Base", "arc_easy")
    assert arc["sampled"] == "400 / 390 / -10"
    assert arc["visited"] == "? / 1000"
    assert arc["inferences a visited question"] == "39.5 / 40.0 / +0.5"
    assert _cells(out / "table6.md", "embeddings")["accuracy"] == "? / 50.0 ± 2.0 (n=70)"
    assert _cells(out / "table6.md", "previous_layer")["accuracy"] == "? / not run"
    for name in ("table3.md", "table3.tex", "table4.md"):
        assert "./eval.sh checkpoint" in (out / name).read_text()
    assert "Commands" not in (out / "table5.md").read_text()  # none of its benchmarks was run
    assert "drllm.ablations table6" in (out / "table6.md").read_text()
    command = "python data_generation.py --model m --dataset arc_easy --num_simulations 9 --samples arc_easy=400"
    assert command in (out / "table2.md").read_text()
    for number in range(2, 7):
        assert "the paper's figure was not at hand" in (out / f"table{number}.md").read_text()
        assert (out / f"table{number}.tex").read_text().startswith("\\begin{tabular}")
    assert str(out / "table2.md") in capsys.readouterr().out


def test_no_results_is_one_sentence(tmp_path, capsys):
    assert tables.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert tables.main([str(tmp_path)]) == 0  # an empty folder: everything is "not run"
    assert "not run" in (tmp_path / "tables" / "table3.md").read_text()


def test_results_of_one_model_are_put_together(results, tmp_path):
    """Out-of-domain results in a folder of their own neither hide the in-domain ones nor count the search twice."""
    later = results / "big-later"
    for name in ("base", "router"):
        make_run(later, name, {"piqa": [1, 1, 1, 0]}, {"piqa": [4, 4, 4, 4]}, base_model="meta-llama/Llama-3.2-3B")
    (later / "labels_manifest.json").write_text((results / "big" / "labels_manifest.json").read_text())
    (later / "command.txt").write_text("./eval.sh later\n")
    assert tables.main([str(results), "--output", str(results / "out")]) == 0
    out = results / "out"
    assert _cells(out / "table3.md", "LLaMA-3B-Base", "base")["ARC accuracy"] == "? / 50.0 ± 50.0 (n=2)"
    assert _cells(out / "table4.md", "LLaMA-3B-Base", "base")["PIQA"] == "? / 75.0 ± 25.0 (n=4)"
    assert "./eval.sh later" not in (out / "table3.md").read_text()
    _cells(out / "table2.md", "LLaMA-3B-Base", "arc_easy")  # one row


def test_the_results_that_are_checked_in_make_tables(tmp_path):
    results = Path(__file__).parents[3] / "results"
    assert tables.main([str(results), "--output", str(tmp_path)]) == 0
    row = _cells(tmp_path / "table3.md", "miniature_demo", "+ router")
    # the demo's own table was made from the files by question
    own = _cells(results / "miniature_demo" / "table.md", "+ router")["Total acc. (%)"]
    mean, _, error = own.partition(" ± ")
    assert row["Total accuracy"] == f"? / {float(mean):.1f} ± {float(error):.1f} (n=2800)"


def test_several_checkpoints_give_mean_and_spread(folder):
    make_run(
        folder,
        "router-2",
        {"drllm_arc_easy": [1, 1, 1, 1], "drllm_dart_2": [1, 1]},
        {"drllm_arc_easy": [4, 4, 4, 4], "drllm_dart_2": [8, 8]},
    )
    loaded = load_runs(folder)
    assert [run.name for run in loaded] == ["base", "router", "router-2"]
    _, (base, router, difference) = tables.table3_over_seeds(loaded[0], loaded[1:])
    assert base[1] == "75.00"
    assert router[0] == "+ router, 2 seeds"
    # ARC: 75 and 100, layers 8 and 4; of base 75 and 8
    assert router[1:3] == ["87.50 ± 17.68", "6.00 ± 2.83"]
    assert difference[1:3] == ["+12.50 ± 17.68", "-2.00 ± 2.83"]
    text = tables.write_comparison(folder)
    assert text.index("+ router, 2 seeds") < text.index("seed by seed") < text.index("+ router-2")
    assert tables.main([str(folder), "--output", str(folder / "out")]) == 0
    cell = _cells(folder / "out" / "table3.md", folder.name, "+ router, 2 seeds")["ARC accuracy"]
    assert cell == "? / 87.5 ± 12.5 (n=4)"  # errors of 25 and 0 over questions
