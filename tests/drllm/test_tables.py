import json
import math

import pytest

from drllm import tables
from drllm.errors import UserError


def make_run(folder, name, correct, blocks, paths=("1111",)):
    """A run of eval.sh on disk: `correct` and `blocks` are task -> values by document."""
    run = folder / name
    (run / "samples").mkdir(parents=True)
    queries = []
    for task, values in correct.items():
        samples = [{"doc_id": n, "filter": "none", "acc": value} for n, value in enumerate(values)]
        (run / "samples" / f"{task}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        queries += [
            {"task": task, "doc_id": n, "blocks": count, "passes": 1, "paths": list(paths)}
            for n, count in enumerate(blocks[task])
        ]
    (run / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    results = {task: {"acc,none": sum(values) / len(values)} for task, values in correct.items()}
    routing = {"num_blocks": 4, "num_windows": 8, "routing_control": -0.5}
    config = {"routing": routing, "model_dtype": "torch.float32", "model_fingerprint": "f"}
    (run / "results.json").write_text(json.dumps({"results": results, "config": config}))
    (run / "run.json").write_text(json.dumps({"run": {"limit": None}}))
    (folder / "command.txt").write_text("./eval.sh checkpoint\n")
    return run


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
    base, router = tables.load_runs(folder)
    assert tables.in_domain_columns(base) == {
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
    header, (arc, dart) = tables.detail(*tables.load_runs(folder))
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


def test_incomplete_results_are_refused(folder, tmp_path):
    (folder / "router" / "queries.jsonl").write_text('{"task": "cut')
    with pytest.raises(UserError, match=r"no complete run of eval\.sh"):
        tables.load_runs(folder)
    (folder / "router" / "run.json").unlink()
    with pytest.raises(UserError, match="no complete runs base and router"):
        tables.load_runs(folder)
