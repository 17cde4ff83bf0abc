"""How much of a label is choice, by hand and from a folder of labels."""

import json

from drllm.labels import Label, LabelSet
from drllm.manifests import Manifest
from experiments import label_choice
from experiments.label_choice import choice, choice_table, main, searched


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


def test_a_row_of_the_table_by_hand():
    row = {"labels": "a", "group": "arc", "questions": 2, "skipped": [1, 0.25, 0], "repeated": [0.1, 0.5, 0.2]}
    table = choice_table([row | {"right_paths": 2.04, "as_short": 1.5}])
    cells = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert cells[:7] == ["a", "arc", "2", "0 to 100", "10 to 50", "2.0", "1.5"]


def test_a_group_without_labels_has_no_row(tmp_path, monkeypatch):
    labels = LabelSet([Label("q", (0, 1), "a", "arc_easy", "1", good_paths=((0, 1),))], Manifest())
    monkeypatch.setattr(label_choice, "read_labels", lambda folder: labels)
    assert main(["--labels", "one", "--output", str(tmp_path / "choice.json")]) == 0
    assert [row["group"] for row in json.loads((tmp_path / "choice.json").read_text())["rows"]] == ["arc"]


def test_an_output_that_cannot_be_written(tiny_labels, tmp_path, capsys):
    assert main(["--labels", str(tiny_labels), "--output", str(tmp_path)]) == 2
    assert "is a folder; pass a file" in capsys.readouterr().err
