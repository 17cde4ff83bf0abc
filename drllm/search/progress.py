"""The label folder while it is written.

Finished questions are appended to progress/RANK.jsonl, one file per process, as they finish. A killed run loses at most
the questions in flight. The same command resumes with any number of processes: each reads all progress files and
appends to its own. Another command is refused with the difference named.
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

MAY_DIFFER = {"model", "revision", "data_dir", "versions", "commit", "labels", "table2"}  # fingerprints say more
SYNC_EVERY_S = 1.0


class Progress:
    """The progress files of a folder: `append` to this process's own, `update` from all.

    Raises UserError when another run is writing to the same file, and when the disk is full.
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
        """Reads what all processes have finished since the last call. A last line without an end is not read yet."""
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
        """Makes this process's file ready for `append`: takes its lock, and removes a half-written last line."""
        with disk_errors(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115  (closed by `close`)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is being written by another run; wait for it, or stop it first") from None
        except OSError:  # a file system without locks (Lustre without -o flock, NFS without lockd)
            print(f"{self.path}: no locks here, so start no second run with this folder", file=sys.stderr)
        self._file.seek(0)
        content_end = 0
        for line in self._file:
            content_end += len(line) if line.endswith(b"\n") else 0
        self._file.truncate(content_end)
        self._size = content_end

    def append(self, row: dict[str, Any]) -> None:
        """Writes one finished question. It outlives the process at once, and a power failure a second later."""
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        with disk_errors(self.path, f"{len(self.selection.records)} finished questions are safe"):
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

    def close(self) -> None:
        """Makes sure that all is on the disk, and gives up the lock."""
        if self._file is not None:
            with disk_errors(self.path):
                os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def read(self, record: Record) -> dict[str, Any]:
        """The whole row of a finished question."""
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
                f"{path}:{number}: not a finished question of this run; delete the line, and it is searched again"
            ) from None
        self.selection.add(question_id, record)


def to_row(searched: SearchedQuestion) -> dict[str, Any]:
    """A finished question as its line of JSON, which is the line of labels.jsonl if it is selected."""
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
    """Makes `folder` ready for a run described by `manifest`, or checks that it was begun by the same one.

    Raises UserError naming the first differences when the folder belongs to other arguments, another model or other
    questions. The keys `MAY_DIFFER` are recorded only.
    """
    path = folder / "manifest.json"
    if path.exists():
        differences = _differences(read_manifest(folder), manifest)
        if differences:
            raise UserError(
                f"{folder} holds labels of another run: {'; '.join(differences[:3])}; repeat that run's arguments, or "
                "choose another --output_dir"
            )
        return
    if (folder / "progress").exists():
        raise UserError(f"{folder} has progress files but no manifest.json: move them away, or choose another folder")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(path, manifest)


def finish(folder: Path, progress: Progress) -> list[dict[str, Any]]:
    """Selects, writes labels.jsonl and completes the manifest; returns Table 2's rows."""
    selection = progress.selection
    kept = selection.selected()
    manifest = read_manifest(folder)
    manifest["labels"] = len(kept)
    manifest["table2"] = selection.table2()

    def lines() -> Iterator[bytes]:
        for _, record in kept:
            yield json.dumps(progress.read(record), ensure_ascii=False).encode() + b"\n"

    write_whole(folder / "labels.jsonl", lines())
    write_json(folder / "manifest.json", manifest)
    return manifest["table2"]


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What is not the same in two manifests, apart from what does not shape the labels."""
    found = []
    for key in sorted((old.keys() | new.keys()) - (set() if prefix else MAY_DIFFER)):
        ours, theirs = new.get(key), old.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            found += _differences(theirs, ours, f"{prefix}{key}.")
        elif ours != theirs:
            found.append(f"{prefix}{key} was {json.dumps(theirs)} and is now {json.dumps(ours)}")
    return found
