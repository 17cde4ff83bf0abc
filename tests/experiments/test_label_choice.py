"""How much of a label is choice, by hand and from a folder of labels."""

import json

from drllm.labels import Label
from experiments.label_choice import choice, main


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


def test_a_table_from_labels(tiny_labels, tmp_path, capsys):
    assert main(["--labels", str(tiny_labels), "--output", str(tmp_path / "choice.json")]) == 0
    rows = json.loads((tmp_path / "choice.json").read_text())["rows"]
    assert sum(row["questions"] for row in rows) == 24
    assert "right paths per question" in capsys.readouterr().out


def test_an_output_that_cannot_be_written(tiny_labels, tmp_path, capsys):
    assert main(["--labels", str(tiny_labels), "--output", str(tmp_path)]) == 2
    assert "is a folder; pass a file" in capsys.readouterr().err
