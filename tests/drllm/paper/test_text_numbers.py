"""The numbers of the paper's text beside ours, by hand and for what is checked in."""

import json
from pathlib import Path

import pytest

from drllm.errors import UserError
from drllm.paper.text_numbers import MEASURES, Found, text_numbers, text_table, write_text_table

ROOT = Path(__file__).parents[3]


@pytest.fixture
def results(tmp_path):
    def write(path, content):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(json.dumps(content))

    row = {"set": "arc_easy", "sampled": 3, "wrong_to_right": 1, "visited": 10, "layers_saved": 2.0}
    rows = [row, row | {"set": "dart-1", "sampled": 1, "wrong_to_right": 0, "layers_saved": 0.0}]
    write("toy/run/labels_manifest.json", {"num_layers": 4, "table2": rows})
    write("toy/group/labels_manifest.json", {"program": "extensions.groups.search", "table2": rows})
    metrics = {"macro_f1": 0.5, "acc": 0.8}
    write("toy/run/training.json", {"class_counts": [1, 2000, 3], "metrics": metrics, "seconds": 7.2})
    runs = [{"setting": s, "seed": n, "accuracy": a} for n, s, a in ((0, "on", 0.5), (0, "off", 0.4), (1, "on", 0.6))]
    runs.append({"setting": "off", "seed": 1, "accuracy": 0.3})
    summary = [{"setting": "on"}, {"setting": "off"}]
    write("toy/teacher_forcing.json", {"ablation": "teacher_forcing", "runs": runs, "summary": summary})
    counts = {"algorithm-1-0": 100, "lambda-5-0": 90, "algorithm-1-1": 200, "lambda-5-1": 160}
    searched = [{"labels": f"out/{name}", "visited": count, "inferences": 1} for name, count in counts.items()]
    write("toy/search_rules/labels.json", {"rows": searched})
    write("empty/note.json", {})
    return tmp_path


def test_every_number_has_a_measure_or_a_reason():
    assert {row["measure"] for row in text_numbers()} - {None} == MEASURES.keys()
    assert all(row["paper"] and row["reason"] for row in text_numbers())


def test_numbers_by_hand(results):
    path = write_text_table(results, results / "tables")
    cells = {
        line.split("|")[1].strip(): line.split("|")[3].strip() for line in path.read_text().splitlines() if "|" in line
    }
    assert cells["number of the text"] == "toy"
    assert cells["questions visited by the search"] == "20"
    assert cells["wrong-to-right labels, %"] == "25.0"
    assert cells["layers saved per label"] == "1.50"
    assert cells["class counts: skip, execute, repeat"] == "1, 2,000, 3 (training part)"
    assert cells["macro-F1 on held-out labels, %"] == "50.0"
    assert cells["accuracy per layer on held-out labels, %"] == "80.0"
    assert cells["teacher forcing on - off, points of accuracy"] == "+20.0 ± 14.1"
    assert cells["lambda 5 against 3: questions visited, %"] == "-15.0 ± 7.1"
    assert cells["macro-F1, 1 to 8 windows"] == "not measured: ablation not run"
    assert "toy: toy/run" in path.read_text()


def test_a_damaged_file_is_named(results):
    (results / "toy/run/training.json").write_text('{"seconds": 7}')
    with pytest.raises(UserError, match=r"toy.*a field is missing or damaged"):
        write_text_table(results, results / "tables")


def test_results_that_are_checked_in_can_be_drawn():
    assert "| 420 |" in text_table([("miniature", Found.of(ROOT / "results/miniature"))]).replace("  ", "")
