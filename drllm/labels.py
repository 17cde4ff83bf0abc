"""Labels: their schema, the reader, which checks every row, and the writer.

A label folder holds

    manifest.json            what the labels belong to (`drllm.manifests`)
    labels.jsonl             one label per line
    progress/00000.jsonl     what a search has finished (`drllm.search.progress`); not read here

`read_labels` reads such a folder, `write_labels` writes one. `read_plain_labels` reads files of other programs, whose
rows only have the fields `question`, `optimal_layer_config` and `answer`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from drllm import manifests
from drllm.errors import UserError
from drllm.files import read_json, shorten, write_json, write_whole
from drllm.manifests import LABELS, MANIFEST, Manifest
from drllm.schema import COUNT, FLAG, NAME, NUMBER, TEXT, Schema, check_fields, is_name, is_text
from train_models.paths import Path as BlockPath
from train_models.paths import check_path

WRONG_TO_RIGHT, SHORTER = "wrong_to_right", "shorter"  # what a label does for its question
GROUP = "group"  # a label that was chosen for a group of questions, so it may be wrong on this one, or the default path
PATH = "optimal_layer_config"  # the authors' name for the path of a label, in files
RUN_AGAIN = Manifest().run_again


def _is_path(value: Any) -> bool:
    return isinstance(value, list) and all(type(visits) is int for visits in value)


COLUMNS: Schema = {
    "question": TEXT,
    PATH: (_is_path, "a list of 0, 1 and 2"),
    "answer": TEXT,
    "set": TEXT,
    "question_id": TEXT,
    "kind": (
        lambda value: value in (WRONG_TO_RIGHT, SHORTER, GROUP),
        f'"{WRONG_TO_RIGHT}" or "{SHORTER}", or "{GROUP}"',
    ),
    "prompt": NAME,
    "base_correct": FLAG,
    "path_correct": (lambda value: value is True, "true: a label keeps the answer right"),
    "base_response": TEXT,
    "path_response": TEXT,
    "simulations": COUNT,
    "inferences": COUNT,
    "good_paths": (lambda value: isinstance(value, list) and all(map(_is_path, value)), "a list of paths"),
}
GROUP_COLUMNS = COLUMNS | {"path_correct": COLUMNS["base_correct"]}
PLAIN_COLUMNS: Schema = {
    "question": NAME,
    PATH: COLUMNS[PATH],
    "answer": (lambda value: is_text(value) or NUMBER[0](value), "text"),
}


@dataclass(frozen=True)
class Label:
    """A question and the path that routers should learn for it: one row of labels.jsonl.

    Attributes:
        question, answer, set, question_id: the question.
        path: the label, [L] values 0/1/2; None where a search found none.
        kind: what the label does for its question; None where there is no label.
        prompt: the prompt of the search; None where the question itself is the prompt.
        base_correct, base_response: the answer along the default path.
        path_correct, path_response: the answer along `path`.
        simulations, inferences: what the search took.
        good_paths: further paths with a right answer.
    """

    question: str
    path: BlockPath | None
    answer: str
    set: str
    question_id: str
    kind: str | None = None
    prompt: str | None = None
    base_correct: bool | None = None
    path_correct: bool | None = None
    base_response: str | None = None
    path_response: str | None = None
    simulations: int = 0
    inferences: int = 0
    good_paths: tuple[BlockPath, ...] = ()

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Label:
        """The inverse of `as_row`."""
        path = row[PATH]
        values = {part.name: row[part.name] for part in fields(cls) if part.name in row}
        return cls(
            **values | {"path": path and tuple(path), "good_paths": tuple(map(tuple, row.get("good_paths", ())))}
        )

    def as_row(self) -> dict[str, Any]:
        """The label as a row of labels.jsonl."""
        return {PATH if part.name == "path" else part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True)
class LabelSet:
    """Checked labels, and the manifest that says what they belong to."""

    labels: list[Label] = field(repr=False)
    manifest: Manifest = field(repr=False)


@dataclass(frozen=True)
class Example:
    """One labelled path of one question, as routers learn it.

    Attributes:
        question: identity of the question, "set/question_id"; splits keep a question's examples together.
        token_ids: the prompt, as the search fed it to the model.
        path: [L] values 0/1/2.
    """

    question: str
    token_ids: tuple[int, ...]
    path: BlockPath


def read_labels(folder: Path | str) -> LabelSet:
    """The labels in `folder`, every row checked.

    Raises:
        UserError: a missing, damaged or unfinished file, a row that is not a label, a path that the model cannot
            follow, a question that is labelled twice; the message names file, line and column.
    """
    folder = Path(folder)
    manifest = manifests.read_manifest(folder)
    path = folder / LABELS
    if manifest.labels is None or not path.exists():
        raise UserError(f"{folder} holds an unfinished run; {manifest.run_again} to resume it")
    labels: list[Label] = []
    first_line: dict[str, int] = {}
    for number, line in _lines(path):
        where = f"{path}:{number}"
        row = _parse(line, where)
        check_fields(row, GROUP_COLUMNS if row.get("kind") == GROUP else COLUMNS, where, word="column")
        _check_paths(row, manifest.num_layers, manifest.budget, where)
        first = first_line.setdefault(row["question_id"], number)
        if first != number:
            raise UserError(f"{where}: the question of line {first} again; each may have one label")
        labels.append(Label.of_row(row))
    if not labels:
        raise UserError(f"{path} is empty: the search kept no label; search more questions, or {manifest.run_again}")
    if len(labels) != manifest.labels:
        raise UserError(
            f"{path} has {len(labels)} rows, the manifest says {manifest.labels}: cut off? {manifest.run_again}"
        )
    return LabelSet(labels, manifest)


def write_labels(folder: Path, manifest: Manifest, labels: Iterable[Label], **results: Any) -> Manifest:
    """Writes labels.jsonl, then completes the manifest with the number of labels and `results`, and returns it."""
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for label in labels:
            count += 1
            yield json.dumps(label.as_row(), ensure_ascii=False).encode() + b"\n"

    write_whole(folder / LABELS, lines())
    completed = replace(manifest, labels=count, results=results)
    write_json(folder / MANIFEST, completed.as_dict())
    return completed


def plain_label_files(source: Path) -> list[Path]:
    """The label files of another program in a folder, or `source` itself if it is such a file."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return [path for path in files if path.suffix in (".jsonl", ".json") and path.is_file() and path.name != MANIFEST]


def read_plain_labels(source: Path | str) -> list[Label]:
    """Labels of the fields question, optimal_layer_config and answer, without a manifest.

    Args:
        source: a .jsonl file (one label per line), a .json file (a list of labels), or a folder of such files.

    Returns:
        The labels; their set is "labels" where a row has none.

    Raises:
        UserError: no labels, a damaged row, paths of several lengths, a question that is labelled twice.
    """
    source = Path(source)
    labels: list[Label] = []
    first_place: dict[tuple[str, str], str] = {}
    for path in plain_label_files(source):
        for where, row in _plain_rows(path):
            check_fields(row, PLAIN_COLUMNS, where, word="column")
            _check_paths({PATH: row[PATH]}, len(labels[0].path) if labels else len(row[PATH]), 2.0, where)
            set_name = row.get("set") if is_name(row.get("set")) else "labels"
            question_id = hashlib.sha256(row["question"].encode()).hexdigest()[:16]
            first = first_place.setdefault((set_name, question_id), where)
            if first != where:
                raise UserError(f"{where}: the question of {first} again; each may have one label")
            path_of_row = tuple(row[PATH])
            labels.append(
                Label(row["question"], path_of_row, row["answer"], set_name, question_id, good_paths=(path_of_row,))
            )
    if not labels:
        raise UserError(f"{source} holds no labels; make them with {manifests.PROGRAM}")
    return labels


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


def _check_paths(row: dict[str, Any], num_layers: int, budget: float, where: str) -> None:
    for column, paths in ((PATH, [row[PATH]]), ("good_paths", row.get("good_paths", ()))):
        for path in paths:
            try:
                check_path(path, num_layers, budget)
            except ValueError as error:
                raise UserError(f"{where}: '{column}': {error}") from None
