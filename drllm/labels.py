"""Labels as training reads them: the schema of a label folder, with every row checked.

A label folder holds

    manifest.json            what the labels belong to: model, dtype, arguments, versions, Table 2
    labels.jsonl             one label per line
    progress/00000.jsonl     what the search has finished (`drllm.search.progress`); training does not read it
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drllm.errors import UserError
from drllm.files import read_json
from train_models.paths import check_path

FORMAT = 1
WRONG_TO_RIGHT, SHORTER = "wrong_to_right", "shorter"  # what a label does for its question


@dataclass(frozen=True)
class LabelSet:
    """Checked labels: `rows` as in labels.jsonl, and the manifest that says what they belong to."""

    rows: list[dict[str, Any]] = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)


def _is_path(value: Any) -> bool:
    return isinstance(value, list) and all(type(visits) is int for visits in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


COLUMNS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "question": (_is_text, "text"),
    "optimal_layer_config": (_is_path, "a list of 0, 1 and 2"),
    "answer": (_is_text, "text"),
    "set": (_is_text, "text"),
    "question_id": (_is_text, "text"),
    "kind": (lambda value: value in (WRONG_TO_RIGHT, SHORTER), f'"{WRONG_TO_RIGHT}" or "{SHORTER}"'),
    "prompt": (lambda value: _is_text(value) and bool(value), "text"),
    "base_correct": (lambda value: isinstance(value, bool), "true or false"),
    "path_correct": (lambda value: value is True, "true: a label keeps the answer right"),
    "base_response": (_is_text, "text"),
    "path_response": (_is_text, "text"),
    "simulations": (_is_count, "a count"),
    "inferences": (_is_count, "a count"),
    "good_paths": (lambda value: isinstance(value, list) and all(map(_is_path, value)), "a list of paths"),
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a label folder.

    Raises:
        UserError: when it is missing, cannot be read, or has another format.
    """
    path = folder / "manifest.json"
    manifest = read_json(path, "make the labels with data_generation.py")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of format {FORMAT}; make the labels again with data_generation.py")
    return manifest


def read_labels(folder: Path | str) -> LabelSet:
    """The labels in `folder`, every row checked.

    Raises UserError, with file and line, for what is missing, cut off, unfinished, doubled or no path of the model.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    path = folder / "labels.jsonl"
    if "labels" not in manifest or not path.exists():
        raise UserError(f"{folder} holds an unfinished run; repeat its data_generation.py command, which continues it")
    rows: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            row = _parse(line, place)
            _check_row(row, manifest, place)
            first = seen.setdefault(row["question_id"], number)
            if first != number:
                raise UserError(f"{place}: the question of line {first} again; each may have one label")
            rows.append(row)
    again = "repeat the data_generation.py command, which writes it anew"
    if not rows:
        raise UserError(f"{path} is empty: the search kept no label; search more questions, or {again}")
    if len(rows) != manifest["labels"]:
        raise UserError(f"{path} has {len(rows)} rows, the manifest says {manifest['labels']}: cut off? {again}")
    return LabelSet(rows, manifest)


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{place}: not valid JSON ({error}); if the file is cut off, repeat the data_generation.py command"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: not an object with the columns {', '.join(COLUMNS)}")
    return row


def _check_row(row: dict[str, Any], manifest: dict[str, Any], place: str) -> None:
    for column, (is_valid, expected) in COLUMNS.items():
        if column not in row:
            raise UserError(f"{place}: no column '{column}'")
        if not is_valid(row[column]):
            raise UserError(f"{place}: '{column}' is {json.dumps(row[column])[:80]}, expected {expected}")
    for column, paths in (("optimal_layer_config", [row["optimal_layer_config"]]), ("good_paths", row["good_paths"])):
        for path in paths:
            try:
                check_path(path, manifest["num_layers"], manifest["arguments"]["budget"])
            except ValueError as error:
                raise UserError(f"{place}: '{column}': {error}") from None
