"""The reader of labels: what it accepts, and which sentence names what is wrong."""

import json

import pytest

from drllm import labels
from drllm.errors import UserError
from drllm.search.progress import label_of
from tests.label_toys import make_finished, question, searched


@pytest.fixture
def finished(tmp_path):
    """A folder of finished labels."""
    return make_finished(tmp_path)


def test_labels_are_read_back(finished):
    found = labels.read_labels(finished)
    assert found.manifest.labels == len(found.labels) == 12
    for label in found.labels:
        assert label_of(searched(question(label.set, int(label.question_id[-3:])))) == label
    rows = [json.loads(line) for line in (finished / "labels.jsonl").read_text().split("\n")[:-1]]
    assert all(list(row) == list(labels.COLUMNS) for row in rows)
    assert [labels.Label.of_row(row) for row in rows] == found.labels


def test_a_manifest_is_read_back_with_the_entries_that_it_does_not_know(finished):
    path = finished / "manifest.json"
    written = json.loads(path.read_text())
    assert labels.read_labels(finished).manifest.as_dict() == written
    old = {name: value for name, value in written.items() if name not in ("reward", "program", "questions", "seed")}
    path.write_text(json.dumps(old | {"later": [1]}))
    manifest = labels.read_labels(finished).manifest
    assert (manifest.reward, manifest.program, manifest.seed) == ("generation", "data_generation.py", None)
    assert manifest.as_dict()["later"] == manifest.results["later"] == [1]


def spoil(folder, number, change):
    """Changes line `number` of the labels: `change` gets the row and returns the new line."""
    path = folder / "labels.jsonl"
    lines = path.read_text().split("\n")
    lines[number - 1] = change(json.loads(lines[number - 1]))
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: json.dumps(row)[:30], r"labels\.jsonl:3: not valid JSON .*run the same data_generation.py"),
        (lambda row: "[1]", r"labels\.jsonl:3: not an object with the columns question"),
        (lambda row: json.dumps({k: v for k, v in row.items() if k != "prompt"}), r":3: no column 'prompt'"),
        (lambda row: json.dumps(row | {"prompt": ""}), r""":3: 'prompt' is "", expected text"""),
        (lambda row: json.dumps(row | {"kind": "longer"}), r""":3: 'kind' is "longer", expected "wrong_to_right" or"""),
        (lambda row: json.dumps(row | {"path_correct": False}), r":3: 'path_correct' is false, expected true"),
        (lambda row: json.dumps(row | {"optimal_layer_config": [1, 1, 1]}), r":3: .*has 3 entries.*4 blocks"),
        (lambda row: json.dumps(row | {"optimal_layer_config": [1, 3, 1, 1]}), r":3: .*block 1 has the value 3"),
        (lambda row: json.dumps(row | {"optimal_layer_config": [0, 0, 0, 1]}), r":3: .*at most two consecutive"),
        (lambda row: json.dumps(row | {"optimal_layer_config": "1111"}), r"""expected a list of 0, 1 and 2"""),
        (lambda row: json.dumps(row | {"good_paths": [[1, 1, 1, 1], [9]]}), r":3: 'good_paths'"),
        (lambda row: json.dumps(row | {"question_id": "arc_easy-000"}), r":3: the question of line 1 again"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(finished, change, message):
    first = labels.read_labels(finished).labels[0].as_row()
    spoil(finished, 1, lambda row: json.dumps(first | {"question_id": "arc_easy-000"}))
    labels.read_labels(finished)
    spoil(finished, 3, change)
    with pytest.raises(UserError, match=message):
        labels.read_labels(finished)


def test_a_label_of_a_group_may_be_wrong_on_a_question_or_the_default_path(finished):
    group = {"kind": "group", "path_correct": False, "optimal_layer_config": [1, 1, 1, 1], "good_paths": []}
    spoil(finished, 3, lambda row: json.dumps(row | group))
    assert labels.read_labels(finished).labels[2].path_correct is False
    spoil(finished, 3, lambda row: json.dumps(row | {"path_correct": None}))
    with pytest.raises(UserError, match=r":3: 'path_correct' is null, expected true or false"):
        labels.read_labels(finished)


def test_missing_empty_and_cut_off_files_are_named(finished, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/manifest\.json does not exist; make the labels with data_generation"):
        labels.read_labels(tmp_path / "nowhere")
    path = finished / "labels.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-2]))
    with pytest.raises(UserError, match="has 10 rows, the manifest says 12: cut off"):
        labels.read_labels(finished)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty: the search kept no label"):
        labels.read_labels(finished)
    path.unlink()
    with pytest.raises(UserError, match=r"unfinished run; run the same data_generation\.py command again to resume it"):
        labels.read_labels(finished)
    (finished / "manifest.json").write_text('{"format": 1')
    with pytest.raises(UserError, match=r"manifest\.json: not valid JSON"):
        labels.read_labels(finished)
    (finished / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="not a manifest of format 1"):
        labels.read_labels(finished)
