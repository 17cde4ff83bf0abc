"""How much of a label is choice, by hand and from a folder of labels."""

import json

from drllm.labels import Label
from experiments.label_choice import choice, main, searched


def test_choice_by_hand():
    paths = [((0, 1, 1), (1, 0, 1), (1, 1, 2)), ((0, 1, 2),)]
    labels = [Label("q", right[0], "a", "arc_easy", str(n), good_paths=right) for n, right in enumerate(paths)]
    assert choice(labels) == {
        "questions": 2,
        "skipped": [1, 0, 0],
        "repeated": [0, 0, 0.5],
        "right_paths": 2,
        "as_short": 1.5,
    }


def test_what_a_search_took_by_hand():
    row = {"set": "arc_easy", "visited": 10, "inferences": 100, "sampled": 3, "wrong_to_right": 1, "layers_saved": 2.0}
    others = [row | {"set": "dart-1", "sampled": 1, "layers_saved": 0.0}, row | {"set": "dart-2", "visited": 99}]
    assert searched([row, *others], ("arc_easy", "dart-1")) == {
        "visited": 20,
        "inferences": 200,
        "sampled": 4,
        "wrong_to_right": 2,
        "layers_saved": 1.5,
        "labels_of_sets": {"arc_easy": 3, "dart-1": 1},
    }


def test_a_table_from_labels(tiny_labels, tmp_path, capsys):
    assert main(["--labels", str(tiny_labels), "--output", str(tmp_path / "choice.json")]) == 0
    rows = json.loads((tmp_path / "choice.json").read_text())["rows"]
    assert sum(row["questions"] for row in rows) == 24
    assert "right paths per question" in capsys.readouterr().out


def test_an_output_that_cannot_be_written(tiny_labels, tmp_path, capsys):
    assert main(["--labels", str(tiny_labels), "--output", str(tmp_path)]) == 2
    assert "is a folder; pass a file" in capsys.readouterr().err
