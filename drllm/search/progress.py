"""The label folder while it is written.

Each process appends its finished questions to progress/RANK.jsonl. A killed run loses at most the questions being
searched. Run the same command to resume, with any number of processes: each reads all progress files and appends to its
own. A command with other arguments is refused, and the error names the difference.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drllm.errors import UserError
from drllm.files import disk_errors, write_json, write_whole
from drllm.labels import read_manifest
from drllm.search.pool import SearchedQuestion
from drllm.search.selection import Record, Selection

MAY_DIFFER = {"model", "revision", "data_dir", "program", "versions", "commit"}
MAY_DIFFER |= {"labels", "groups", "table2", "shortfalls"}  # known at the end of a run
SYNC_EVERY_S = 1.0


class Progress:
    """The progress files of a folder: `append` writes this process's own file, `update` reads all of them.

    Its methods raise UserError when another run is writing to the same file, and when the disk is full.
    """

    def __init__(self, folder: Path, rank: int, selection: Selection) -> None:
        self.folder = folder / "progress"
        self.path = self.folder / f"{rank:05d}.jsonl"
        self.selection = selection
        self._read_up_to: dict[str, int] = {}
        self._file: Any = None
        self._size = 0
        self._synced_at = 0.0

    def update(self) -> None:
        """Reads the questions that all processes have finished since the last call; an incomplete last line waits."""
        for path in sorted(self.folder.glob("*.jsonl")):
            start = self._read_up_to.get(path.name, 0)
            if path.stat().st_size <= start:
                continue
            with path.open("rb") as file:
                file.seek(start)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._note(line, path, start)
                    start += len(line)
            self._read_up_to[path.name] = start

    def open(self) -> None:
        """Opens this process's file for `append`: takes its lock and removes an incomplete last line."""
        with disk_errors(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115  (closed by `close`)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is being written by another run; wait for it to end, or stop it") from None
        except OSError:  # a file system without locks (Lustre without -o flock, NFS without lockd)
            print(
                f"{self.path}: this file system has no locks; do not start a second run in this folder", file=sys.stderr
            )
        self._file.seek(0)
        content_end = 0
        for line in self._file:
            content_end += len(line) if line.endswith(b"\n") else 0
        self._file.truncate(content_end)
        self._size = content_end

    def append(self, row: dict[str, Any]) -> None:
        """Writes one finished question. It survives a kill at once, and a power failure after a second."""
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        with disk_errors(self.path, f"{len(self.selection.records)} finished questions are kept"):
            try:
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:])
                self._size += len(line)
                if time.monotonic() - self._synced_at >= SYNC_EVERY_S:
                    os.fsync(self._file.fileno())
                    self._synced_at = time.monotonic()
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._size)
                raise

    def sync(self) -> None:
        """Flushes this process's file to the disk, where the other processes see it."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes the file and releases its lock; without effect if it is not open."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def read(self, record: Record) -> dict[str, Any]:
        """The row of a finished question."""
        with (self.folder / record.shard).open("rb") as file:
            file.seek(record.offset)
            return json.loads(file.readline())

    def _note(self, line: bytes, path: Path, offset: int) -> None:
        try:
            row = json.loads(line)
            question_id, best = row["question_id"], row["optimal_layer_config"]
            record = Record(
                set=row["set"],
                position=self.selection.positions[question_id],
                kind=row["kind"],
                base_correct=row["base_correct"],
                inferences=row["inferences"],
                simulations=row["simulations"],
                layers_saved=0 if best is None else len(best) - sum(best),
                shard=path.name,
                offset=offset,
            )
        except (ValueError, KeyError, TypeError):
            with path.open("rb") as file:
                number = file.read(offset).count(b"\n") + 1
            raise UserError(
                f"{path}:{number}: not a finished question of this run; delete this line to search the question again"
            ) from None
        self.selection.add(question_id, record)


def to_row(searched: SearchedQuestion) -> dict[str, Any]:
    """A finished question as a row of its progress file, and of labels.jsonl if it is kept."""
    question, result = searched.prompt.question, searched.result
    return {
        "question": question.text,
        "optimal_layer_config": None if result.best_path is None else list(result.best_path),
        "answer": question.answer,
        "set": question.set,
        "question_id": question.id,
        "kind": result.kind,
        "prompt": searched.prompt.text,
        "base_correct": result.base_correct,
        "path_correct": result.best_path is not None,
        "base_response": searched.base_response,
        "path_response": searched.path_response,
        "simulations": result.simulations,
        "inferences": result.inferences,
        "good_paths": [list(path) for path in result.good_paths],
    }


def begin(folder: Path, manifest: dict[str, Any]) -> None:
    """Creates the label folder of a run, or checks that the run which created it had the same manifest.

    The keys in `MAY_DIFFER` are not compared.

    Raises:
        UserError: the folder belongs to other arguments, another model or other questions; names the differences.
    """
    path = folder / "manifest.json"
    if path.exists():
        published = {"reward": "generation"}  # what a manifest without the field means
        differences = _differences(published | read_manifest(folder), published | manifest)
        if differences:
            raise UserError(
                f"{folder} holds labels of another run: {'; '.join(differences[:3])}; repeat that run's arguments, or "
                "choose another --output_dir"
            )
        return
    if (folder / "progress").exists():
        raise UserError(f"{folder} has progress files but no manifest.json: move them, or choose another --output_dir")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(path, manifest)


def finish(folder: Path, progress: Progress) -> dict[str, Any]:
    """Writes the labels to keep to labels.jsonl, completes the manifest, and returns it."""
    selection = progress.selection
    kept = selection.selected()
    manifest = read_manifest(folder)
    manifest["labels"] = len(kept)
    manifest["table2"] = selection.table2()
    manifest["shortfalls"] = selection.shortfalls()

    def lines() -> Iterator[bytes]:
        for _, record in kept:
            yield json.dumps(progress.read(record), ensure_ascii=False).encode() + b"\n"

    write_whole(folder / "labels.jsonl", lines())
    write_json(folder / "manifest.json", manifest)
    return manifest


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The differences between two manifests, one phrase each, in what affects the labels."""
    differences = []
    for key in sorted((old.keys() | new.keys()) - (set() if prefix else MAY_DIFFER)):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            differences += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            differences.append(f"{prefix}{key} was {json.dumps(before)} and is now {json.dumps(now)}")
    return differences
