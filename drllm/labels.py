"""Labels: the schema and the reader, which checks every row.

A label folder holds

    manifest.json            what the labels belong to: model, dtype, arguments, versions, Table 2
    labels.jsonl             one label per line
    progress/00000.jsonl     what the search has finished (`drllm.search.progress`); not read here

`read_labels` reads such a folder; extensions.groups.search writes one without progress/, whose labels are those of
groups of questions. `read_plain_labels` reads files of other programs, whose rows only have the fields `question`,
`optimal_layer_config` and `answer`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drllm.errors import UserError
from drllm.files import read_json, shorten
from drllm.provenance import DTYPES
from train_models.paths import check_path

FORMAT = 1
WRONG_TO_RIGHT, SHORTER = "wrong_to_right", "shorter"  # what a label does for its question
GROUP = "group"  # a label that was chosen for a group of questions, so it may be wrong on this one, or the default path
MANIFEST, LABELS = "manifest.json", "labels.jsonl"
PROGRAM = "data_generation.py"  # that made labels whose manifest names no other
RUN_AGAIN = f"run the same {PROGRAM} command again"


@dataclass(frozen=True)
class LabelSet:
    """Checked labels: `rows` as in labels.jsonl, and the manifest that says what they belong to."""

    rows: list[dict[str, Any]] = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)


def _is_path(value: Any) -> bool:
    return isinstance(value, list) and all(type(visits) is int for visits in value)


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no tokenizer takes
        return False
    return True


def _is_name(value: Any) -> bool:
    return _is_text(value) and bool(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


# column or field -> (check, what is expected)
Schema = dict[str, tuple[Callable[[Any], bool], str]]

COLUMNS: Schema = {
    "question": (_is_text, "text"),
    "optimal_layer_config": (_is_path, "a list of 0, 1 and 2"),
    "answer": (_is_text, "text"),
    "set": (_is_text, "text"),
    "question_id": (_is_text, "text"),
    "kind": (
        lambda value: value in (WRONG_TO_RIGHT, SHORTER, GROUP),
        f'"{WRONG_TO_RIGHT}" or "{SHORTER}", or "{GROUP}"',
    ),
    "prompt": (_is_name, "text"),
    "base_correct": (lambda value: isinstance(value, bool), "true or false"),
    "path_correct": (lambda value: value is True, "true: a label keeps the answer right"),
    "base_response": (_is_text, "text"),
    "path_response": (_is_text, "text"),
    "simulations": (_is_count, "a count"),
    "inferences": (_is_count, "a count"),
    "good_paths": (lambda value: isinstance(value, list) and all(map(_is_path, value)), "a list of paths"),
}
GROUP_COLUMNS = COLUMNS | {"path_correct": COLUMNS["base_correct"]}
PLAIN_COLUMNS: Schema = {
    "question": (_is_name, "text"),
    "optimal_layer_config": COLUMNS["optimal_layer_config"],
    "answer": (lambda value: _is_text(value) or type(value) in (int, float), "text"),
}
MANIFEST_FIELDS: Schema = {
    "model": (_is_name, "text"),
    "model_fingerprint": (_is_name, "text"),
    "num_layers": (lambda value: _is_count(value) and value > 0, "the number of blocks"),
    "dtype": (lambda value: isinstance(value, str) and value in DTYPES, "the name of a dtype"),
    "chat_template": (lambda value: isinstance(value, bool), "true or false"),
    "arguments": (lambda value: isinstance(value, dict), "an object"),
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a label folder, which may be unfinished.

    Raises:
        UserError: it is missing, cannot be read, or has another format.
    """
    path = folder / MANIFEST
    manifest = read_json(path, "make the labels with data_generation.py")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of format {FORMAT}; make the labels again with data_generation.py")
    return manifest


def check_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Raises UserError, with file and field, unless `manifest` has what readers of labels need."""
    fix = "make the labels again with data_generation.py"
    for name, (is_valid, expected) in MANIFEST_FIELDS.items():
        if name not in manifest:
            raise UserError(f"{path}: no field '{name}'; {fix}")
        if not is_valid(manifest[name]):
            raise UserError(f"{path}: '{name}' is {shorten(manifest[name])}, expected {expected}; {fix}")
    budget = manifest["arguments"].get("budget")
    if not _is_positive(budget):
        raise UserError(f"{path}: 'arguments.budget' is {shorten(budget)}, expected a number above 0; {fix}")
    revision = manifest.get("revision")
    if revision is not None and not _is_text(revision):
        raise UserError(f"{path}: 'revision' is {shorten(revision)}, expected text or null; {fix}")


def read_labels(folder: Path | str) -> LabelSet:
    """The labels in `folder`, every row checked.

    Raises:
        UserError: a missing, damaged or unfinished file, a row that is not a label, a path that the model cannot
            follow, a question that is labelled twice; the message names file, line and column.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    path = folder / LABELS
    run_again = RUN_AGAIN.replace(PROGRAM, str(manifest.get("program", PROGRAM)))
    if "labels" not in manifest or not path.exists():
        raise UserError(f"{folder} holds an unfinished run; {run_again} to resume it")
    check_manifest(manifest, folder / MANIFEST)
    rows: list[dict[str, Any]] = []
    first_line: dict[str, int] = {}
    for number, line in _lines(path):
        where = f"{path}:{number}"
        row = _parse(line, where)
        _check_row(row, GROUP_COLUMNS if row.get("kind") == GROUP else COLUMNS, where)
        _check_paths(row, manifest["num_layers"], manifest["arguments"]["budget"], where)
        first = first_line.setdefault(row["question_id"], number)
        if first != number:
            raise UserError(f"{where}: the question of line {first} again; each may have one label")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty: the search kept no label; search more questions, or {run_again}")
    if len(rows) != manifest["labels"]:
        raise UserError(
            f"{path} has {len(rows)} rows, the manifest says {shorten(manifest['labels'])}: cut off? {run_again}"
        )
    return LabelSet(rows, manifest)


def plain_label_files(source: Path) -> list[Path]:
    """The label files of another program in a folder, or `source` itself if it is such a file."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return [path for path in files if path.suffix in (".jsonl", ".json") and path.is_file() and path.name != MANIFEST]


def read_plain_labels(source: Path | str) -> list[dict[str, Any]]:
    """Labels of the fields question, optimal_layer_config and answer, without a manifest.

    Args:
        source: a .jsonl file (one label per line), a .json file (a list of labels), or a folder of such files.

    Returns:
        The rows, with `set` ("labels" where a row has none), `question_id` and `good_paths` added as in labels.jsonl.

    Raises:
        UserError: no labels, a damaged row, paths of several lengths, a question that is labelled twice.
    """
    source = Path(source)
    rows: list[dict[str, Any]] = []
    first_place: dict[tuple[str, str], str] = {}
    num_layers = None
    for path in plain_label_files(source):
        for where, row in _plain_rows(path):
            _check_row(row, PLAIN_COLUMNS, where)
            layers = len(row["optimal_layer_config"])
            num_layers = num_layers or layers
            _check_paths({**row, "good_paths": []}, num_layers, 2.0, where)
            set_name = row.get("set") if _is_name(row.get("set")) else "labels"
            question_id = hashlib.sha256(row["question"].encode()).hexdigest()[:16]
            first = first_place.setdefault((set_name, question_id), where)
            if first != where:
                raise UserError(f"{where}: the question of {first} again; each may have one label")
            added = {"set": set_name, "question_id": question_id, "good_paths": [row["optimal_layer_config"]]}
            rows.append({name: row[name] for name in PLAIN_COLUMNS} | added)
    if not rows:
        raise UserError(f"{source} holds no labels; make them with data_generation.py")
    return rows


def _plain_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".json":
        for number, row in enumerate(read_json(path, "pass a list of labels", list), start=1):
            if not isinstance(row, dict):
                raise UserError(f"{path}, label {number}: expected an object, found {shorten(row)}")
            yield f"{path}, label {number}", row
        return
    for number, line in _lines(path):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from enumerate(file, start=1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {RUN_AGAIN}") from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); if the file is cut off, {RUN_AGAIN}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object with the columns {', '.join(COLUMNS)}")
    return row


def _check_row(row: dict[str, Any], schema: Schema, where: str) -> None:
    for column, (is_valid, expected) in schema.items():
        if column not in row:
            raise UserError(f"{where}: no column '{column}'")
        if not is_valid(row[column]):
            raise UserError(f"{where}: '{column}' is {shorten(row[column], 80)}, expected {expected}")


def _check_paths(row: dict[str, Any], num_layers: int, budget: float, where: str) -> None:
    for column, paths in (("optimal_layer_config", [row["optimal_layer_config"]]), ("good_paths", row["good_paths"])):
        for path in paths:
            try:
                check_path(path, num_layers, budget)
            except ValueError as error:
                raise UserError(f"{where}: '{column}': {error}") from None
