import json
import math

from drllm.evaluation import comparison_table
from drllm.evaluation.results import in_domain_columns, load_runs
from tests.eval_toys import make_run


def test_numbers_are_those_computed_by_hand(two_runs):
    base, router = load_runs(two_runs)
    assert in_domain_columns(base) == {
        "ARC": ["drllm_arc_easy"],
        "DART": ["drllm_dart_2"],
        "Total": ["drllm_arc_easy", "drllm_dart_2"],
    }
    header, rows = comparison_table.table3([base, router])
    assert header[1:] == [
        "ARC acc. (%)",
        "ARC layers",
        "DART acc. (%)",
        "DART layers",
        "Total acc. (%)",
        "Total layers",
        "all questions acc. (%)",
        "all questions layers",
    ]
    assert [row[0] for row in rows] == ["base", "+ router", "difference"]
    assert rows[0][1] == "75.00 ± 25.00"
    assert rows[0][3:5] == ["0.00 ± 0.00", "16.00 ± 4.00"]
    # Total gives both sets the same weight although one has twice the questions, "all questions" does not.
    assert rows[0][5:] == ["37.50 ± 12.50", "12.00 ± 2.00", "50.00 ± 22.36", "10.67 ± 1.98"]
    # differences by question: accuracy 0, +1, -1, 0 of ARC, +1, 0 of DART; layers -2, 0, 0, +2 and -5, 0
    arc, dart = math.sqrt(2 / 3 / 4), math.sqrt(1 / 2 / 2)
    assert rows[2][1] == f"+0.00 ± {100 * arc:.2f}"
    assert rows[2][5] == f"+25.00 ± {100 * math.hypot(arc, dart) / 2:.2f}"
    assert rows[2][2] == "+0.00 ± 0.82"
    assert rows[2][6].startswith("-1.25 ± ")
    assert rows[2][7].startswith("+16.67 ± ")
    assert rows[2][8].startswith("-0.83 ± ")


def test_total_is_the_papers_two_sevenths_and_five_sevenths(tmp_path):
    """Every set has the same weight, regardless of its number of questions; "all questions" only where sizes differ."""
    sets = ["drllm_arc_easy", "drllm_arc_challenge", *(f"drllm_dart_{level}" for level in range(1, 6))]
    for sizes, extra in (([9, 5, 1, 2, 3, 4, 5], 2), ([3] * 7, 0)):
        folder = tmp_path / str(extra)
        correct = {
            name: [1.0] * size if "arc" in name else [0.0] * size for name, size in zip(sets, sizes, strict=True)
        }
        blocks = {name: [7 if "arc" in name else 14] * len(values) for name, values in correct.items()}
        for name in ("base", "router"):
            make_run(folder, name, correct, blocks)
        header, (base, _, difference) = comparison_table.table3(load_runs(folder))
        assert header[5:7] == ["Total acc. (%)", "Total layers"]
        assert base[5].split()[0] == f"{200 / 7:.2f}"
        assert base[6].split()[0] == f"{7 * 2 / 7 + 14 * 5 / 7:.2f}"
        assert difference[5].split()[0] == "+0.00"
        assert len(header) == 7 + extra
        assert len(base) == len(header)


def test_detail_counts_fixed_and_broken_answers(two_runs):
    header, (arc, dart) = comparison_table.detail(*load_runs(two_runs))
    assert arc[header.index("fixed")] == "1"
    assert arc[header.index("broken")] == "1"
    assert dart[header.index("fixed")] == "1"
    assert arc[header.index("skipped (%)")] == "25.0"
    assert arc[header.index("repeated (%)")] == "25.0"
    assert arc[header.index("questions")] == "4"


def test_markdown_and_latex_have_the_same_cells(two_runs):
    text = comparison_table.write_comparison(two_runs)
    assert "Questions: ARC 4, DART 2, Total 6." in text
    tex = (two_runs / "table.tex").read_text()
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
    header, rows = comparison_table.detail(*load_runs(tmp_path))
    assert len(rows) == 1
    assert rows[0][:4] == ["mmlu", "3", "33.33 ± 10.00", "66.67 ± 10.00"]
    assert rows[0][4] == "+33.33 ± 33.33"
    assert rows[0][header.index("fixed")] == "1"


def test_agieval_is_reported_weighted_too(tmp_path):
    for name, share in (("base", 0.9), ("router", 0.8)):
        run = make_run(tmp_path, name, {"agieval_aqua_rat": [1, 0]}, {"agieval_aqua_rat": [4, 4]})
        results = json.loads((run / "results.json").read_text())
        results["results"] = {"agieval": {"acc,none": share}, "agieval_aqua_rat": {"acc_norm,none": 0.5}}
        results["group_subtasks"] = {"agieval": ["agieval_aqua_rat"]}
        (run / "results.json").write_text(json.dumps(results))
        (run / "run.json").write_text(json.dumps({"run": {"limit": None, "tasks": "agieval"}}))
    text = comparison_table.write_comparison(tmp_path)
    assert " 50.00 |" in text
    assert "weighed by their questions, as lm-eval does, base 90.00, router 80.00." in text


def test_several_checkpoints_give_mean_and_spread(two_runs):
    make_run(
        two_runs,
        "router-2",
        {"drllm_arc_easy": [1, 1, 1, 1], "drllm_dart_2": [1, 1]},
        {"drllm_arc_easy": [4, 4, 4, 4], "drllm_dart_2": [8, 8]},
    )
    loaded = load_runs(two_runs)
    assert [run.name for run in loaded] == ["base", "router", "router-2"]
    _, (base, router, difference) = comparison_table.table3_over_seeds(loaded[0], loaded[1:])
    assert base[1] == "75.00"
    assert router[0] == "+ router, 2 seeds"
    # ARC: 75 and 100, layers 8 and 4; of base 75 and 8
    assert router[1:3] == ["87.50 ± 17.68", "6.00 ± 2.83"]
    assert difference[1:3] == ["+12.50 ± 17.68", "-2.00 ± 2.83"]
    text = comparison_table.write_comparison(two_runs)
    assert text.index("+ router, 2 seeds") < text.index("seed by seed") < text.index("+ router-2")


def test_checked_in_results_have_differences_without_errors(two_runs):
    """Without the files by question a difference has no paired error, and nobody knows what was fixed or broken."""
    whole = comparison_table.table3(load_runs(two_runs))
    for name in ("base", "router"):
        results = json.loads((two_runs / name / "results.json").read_text())
        for run in load_runs(two_runs)[:2]:
            if run.name == name:
                results["config"]["block_applications"] = {
                    task: {
                        "queries": run.layers([task]).count,
                        "blocks_per_query": run.layers([task]).mean,
                        "blocks_per_query_stderr": run.layers([task]).stderr,
                        "share": {
                            action: run.share([task], n) for n, action in enumerate(("skip", "execute", "repeat"))
                        },
                    }
                    for task in run.tasks
                }
        (two_runs / name / "results.json").write_text(json.dumps(results))
    for name in ("base", "router"):
        (two_runs / name / "queries.jsonl").unlink()
        for samples in (two_runs / name / "samples").iterdir():
            samples.unlink()
    _, rows = comparison_table.table3(load_runs(two_runs))
    assert [cell.split(" ± ")[0] for cell in rows[2]] == [cell.split(" ± ")[0] for cell in whole[1][2]]
    assert "±" not in rows[2][5]
    header, (arc, _) = comparison_table.detail(*load_runs(two_runs))
    assert (arc[header.index("fixed")], arc[header.index("skipped (%)")]) == ("–", "25.0")
    assert "not run" not in comparison_table.write_comparison(two_runs)
