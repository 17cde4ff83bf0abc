"""Property tests: label folders and files damaged in thousands of ways are refused with one sentence, or are labels."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drllm.errors import UserError
from drllm.labels import COLUMNS, read_labels, read_plain_labels
from drllm.manifests import OPTIONAL, REQUIRED
from drllm.training.data import load_labels

MANY = settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**70, "1", -1, "\ud800"]),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=4), values, max_size=3),
    max_leaves=8,
)
FIELDS = sorted({*COLUMNS, *REQUIRED, *OPTIONAL, "format", "budget"})


@pytest.fixture(scope="module")
def valid(tiny_labels) -> dict[str, bytes]:
    """The files of a label folder of three rows."""
    rows = (tiny_labels / "labels.jsonl").read_bytes().splitlines(keepends=True)[:3]
    manifest = json.loads((tiny_labels / "manifest.json").read_bytes()) | {"labels": 3}
    return {"labels.jsonl": b"".join(rows), "manifest.json": json.dumps(manifest).encode()}


def refusal(read: Callable[[], object]) -> str | None:
    """The sentence of a UserError, None without one; any other exception is a defect."""
    try:
        read()
    except UserError as error:
        sentence = str(error)
        sentence.encode()  # it can be printed
        return sentence
    return None


def check(files: dict[str, bytes]) -> bool:
    """Whether the files are labels; every refusal names the folder."""
    folder = Path(tempfile.mkdtemp())
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if (message := refusal(lambda: load_labels([str(folder)], say=lambda line: None))) is not None:
            assert str(folder) in message
            return False
        labels = read_labels(folder)
        assert len(labels.labels) == labels.manifest.labels
        return True
    finally:
        shutil.rmtree(folder)


def test_the_files_are_labels_before_they_are_damaged(valid):
    assert check(valid)


@MANY
@given(name=st.sampled_from(["labels.jsonl", "manifest.json"]), data=st.data())
def test_bytes_cut_inserted_and_changed(name, data, valid):
    content = bytearray(valid[name])
    start = data.draw(st.integers(0, len(content) - 1))
    removed = data.draw(st.integers(0, len(content)))
    content[start : start + removed] = data.draw(st.binary(max_size=20))
    check(valid | {name: bytes(content)})


@MANY
@given(row=st.integers(0, 2), field=st.sampled_from(FIELDS), value=JSON)
def test_values_of_any_kind_in_rows(row, field, value, valid):
    rows = [json.loads(line) for line in valid["labels.jsonl"].splitlines()]
    rows[row][field] = value
    check(valid | {"labels.jsonl": b"".join(json.dumps(line).encode() + b"\n" for line in rows)})


@MANY
@given(field=st.sampled_from(FIELDS), value=JSON, is_removed=st.booleans())
def test_values_of_any_kind_in_the_manifest(field, value, is_removed, valid):
    manifest = json.loads(valid["manifest.json"]) | {field: value}
    if is_removed:
        del manifest[field]
    manifest["arguments"] = {"budget": value} if field == "budget" else manifest.get("arguments")
    check(valid | {"manifest.json": json.dumps(manifest).encode()})


@MANY
@given(value=JSON)
def test_manifests_of_any_kind(value, valid):
    assert not check(valid | {"manifest.json": json.dumps(value).encode()})


@pytest.mark.parametrize("name", ["labels.jsonl", "manifest.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000, b"\xff\xfe\x00", b"\x00" * 99])
def test_deep_nesting_and_long_numbers(name, content, valid):
    assert not check(valid | {name: content})


@MANY
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "question": st.text(max_size=3) | JSON,
                "optimal_layer_config": st.lists(st.integers(-1, 3), max_size=4) | JSON,
                "answer": JSON,
                "set": JSON,
            },
        )
        | JSON,
        max_size=3,
    ),
    suffix=st.sampled_from([".json", ".jsonl"]),
    tail=st.binary(max_size=3),
)
def test_labels_of_three_fields(rows, suffix, tail):
    folder = Path(tempfile.mkdtemp())
    try:
        text = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"paths{suffix}").write_bytes(text.encode() + tail)
        for source in (folder, folder / f"paths{suffix}"):
            if (message := refusal(lambda source=source: read_plain_labels(source))) is not None:
                assert str(folder) in message
            else:
                labels = read_plain_labels(source)
                assert all(label.question and set(label.path) <= {0, 1, 2} for label in labels)
    finally:
        shutil.rmtree(folder)
