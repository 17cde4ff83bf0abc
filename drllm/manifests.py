"""Manifests: what labels belong to, and how they were made.

A label folder has one (manifest.json); a checkpoint has a copy of those of its labels (labels_manifest.json: one, or a
list). `begin` writes the first when a search begins, `drllm.labels.write_labels` completes it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from drllm.errors import UserError
from drllm.files import disk_errors, read_json, shorten, write_json
from drllm.provenance import DTYPES
from drllm.questions.response_format import ResponseFormat
from drllm.rollouts.rewards import PUBLISHED, REWARDS
from drllm.schema import COUNT, FLAG, NAME, OBJECT, TEXT, Schema, check_fields, or_null

FORMAT = 1
MANIFEST, LABELS, PROGRESS = "manifest.json", "labels.jsonl", "progress"  # in a label folder
CHECKPOINT_MANIFEST = "labels_manifest.json"  # in a checkpoint
PROGRAM = "data_generation.py"  # that made labels whose manifest names no other
MAKE_AGAIN = f"make the labels again with {PROGRAM}"
COPY_AGAIN = f"copy the {MANIFEST} of the labels there, or delete it"


REQUIRED: Schema = {
    "model": NAME,
    "model_fingerprint": NAME,
    "num_layers": (lambda value: type(value) is int and value > 0, "the number of blocks"),
    "dtype": (lambda value: isinstance(value, str) and value in DTYPES, "the name of a dtype"),
    "chat_template": FLAG,
    "arguments": OBJECT,
}
OPTIONAL: Schema = {
    "reward": (lambda value: isinstance(value, str) and value in REWARDS, f"one of {', '.join(REWARDS)}"),
    "revision": or_null(TEXT),
    "data_dir": or_null(TEXT),
    "program": NAME,
    "grader_version": or_null(COUNT),
    "labels": or_null(COUNT),
}


@dataclass(frozen=True)
class Manifest:
    """What labels belong to, and how they were made. The defaults stand for what older manifests do not say.

    Attributes:
        model, revision: folder or Hub name of the base model, and its revision on the Hub.
        model_fingerprint: hash of its weights (`provenance.fingerprint`).
        num_layers: L.
        dtype: name of the dtype of the weights.
        chat_template: whether prompts have the tokenizer's chat template.
        arguments: values of the command line that affect the labels, with the response format and the sets ("dataset").
        reward: name of the reward.
        seed: seed of the search.
        data_dir: folder of the question files; None: the Hub; "": not said.
        questions: set -> digest of its questions.
        program: what made the labels.
        grader_version: version of the graders (`drllm.questions.grading.GRADER_VERSION`); None: not said.
        versions, commit: libraries and code that made them.
        labels: number of labels; None while the run is unfinished.
        results: what the run found besides labels, e.g. Table 2, and any other entry of the file.
    """

    model: str = ""
    model_fingerprint: str = ""
    num_layers: int = 0
    dtype: str = ""
    chat_template: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    reward: str = PUBLISHED
    revision: str | None = None
    seed: int | None = None
    data_dir: str | None = ""
    questions: dict[str, str] | None = None
    program: str = PROGRAM
    grader_version: int | None = None
    versions: dict[str, str] | None = None
    commit: str | None = None
    labels: int | None = None
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def budget(self) -> float:
        """Longest path, in multiples of the number of blocks."""
        return self.arguments["budget"]

    @property
    def response_format(self) -> ResponseFormat:
        """How responses were limited and graded, without limits that are the default; UserError for damaged fields."""
        return ResponseFormat.of_dict(self.arguments).without_defaults(self.chat_template)

    @property
    def run_again(self) -> str:
        """How an unfinished or a damaged folder is completed, the end of a sentence."""
        return f"run the same {self.program} command again"

    @classmethod
    def of_dict(cls, record: dict[str, Any], path: Path, fix: str = MAKE_AGAIN, is_whole: bool = True) -> Manifest:
        """The inverse of `as_dict`.

        Args:
            record: JSON of the file `path`.
            fix: the end of error messages.
            is_whole: refuse a manifest that lacks what readers of labels need; otherwise its fields are empty.

        Raises:
            UserError: a field is missing or has another type.
        """
        check_fields(record, REQUIRED | OPTIONAL, path, fix, may_lack=OPTIONAL if is_whole else REQUIRED | OPTIONAL)
        budget = record.get("arguments", {}).get("budget")
        if is_whole and not (type(budget) in (int, float) and 0 < budget < math.inf):
            raise UserError(f"{path}: 'arguments.budget' is {shorten(budget)}, expected a number above 0; {fix}")
        known = {part.name: record[part.name] for part in fields(cls) if part.name in record}
        others = {name: value for name, value in record.items() if name not in known and name != "format"}
        return cls(**known | {"results": others})

    def as_dict(self) -> dict[str, Any]:
        """The manifest as JSON."""
        record = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "results"}
        if self.labels is None:
            del record["labels"]
        return {"format": FORMAT, **record, **self.results}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a label folder, which may be unfinished.

    Raises:
        UserError: it is missing, damaged, or has another format.
    """
    path = folder / MANIFEST
    record = read_json(path, f"make the labels with {PROGRAM}")
    if record.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of format {FORMAT}; {MAKE_AGAIN}")
    return Manifest.of_dict(record, path)


def read_checkpoint_manifests(checkpoint: Path) -> list[Manifest]:
    """The manifests of the labels that a checkpoint was trained on; empty when it has none.

    Raises:
        UserError: the file is damaged; the message names the field.
    """
    path = checkpoint / CHECKPOINT_MANIFEST
    if not path.exists():
        return []
    records = read_json(path, COPY_AGAIN, object)
    records = records if isinstance(records, list) else [records]
    if not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: expected an object or a list of objects; {COPY_AGAIN}")
    return [Manifest.of_dict(record, path, COPY_AGAIN, is_whole=False) for record in records]


def checkpoint_record(manifests: list[Manifest]) -> dict[str, Any] | list[dict[str, Any]]:
    """The manifests of a checkpoint's labels as JSON: one object, or a list of several."""
    records = [manifest.as_dict() for manifest in manifests]
    return records[0] if len(records) == 1 else records


def begin(folder: Path, manifest: Manifest) -> Manifest:
    """Creates the label folder of a run, or checks that the run which created it had the same manifest.

    Returns:
        The manifest of the folder.

    Raises:
        UserError: the folder belongs to other arguments, another model or other questions; names the differences.
    """
    path = folder / MANIFEST
    if path.exists():
        found = read_manifest(folder)
        if differences := _differences(_identity(found), _identity(manifest)):
            raise UserError(
                f"{folder} holds labels of another run: {'; '.join(differences[:3])}; repeat that run's arguments, or "
                "choose another --output_dir"
            )
        return found
    if (folder / PROGRESS).exists():
        raise UserError(f"{folder} has progress files but no {MANIFEST}: move them, or choose another --output_dir")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(path, manifest.as_dict())
    return manifest


def _identity(manifest: Manifest) -> dict[str, Any]:
    """What affects the labels."""
    may_differ = ("model", "revision", "data_dir", "program", "versions", "commit", "labels", "results")
    return {part.name: getattr(manifest, part.name) for part in fields(manifest) if part.name not in may_differ}


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The differences between two records, one phrase each."""
    differences = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            differences += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            differences.append(f"{prefix}{key} was {json.dumps(before)} and is now {json.dumps(now)}")
    return differences
