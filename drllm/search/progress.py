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
from pathlib import Path
from typing import Any

from drllm.errors import UserError
from drllm.files import disk_errors
from drllm.labels import Label, write_labels
from drllm.manifests import PROGRESS, Manifest
from drllm.search.pool import SearchedQuestion
from drllm.search.selection import Record, Selection

SYNC_EVERY_S = 1.0


class Progress:
    """The progress files of a folder: `append` writes this process's own file, `update` reads all of them.

    Its methods raise UserError when another run is writing to the same file, and when the disk is full.
    """

    def __init__(self, folder: Path, rank: int, selection: Selection) -> None:
        self.folder = folder / PROGRESS
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

    def append(self, searched: SearchedQuestion) -> None:
        """Writes one finished question. It survives a kill at once, and a power failure after a second."""
        row = label_of(searched).as_row()
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

    def read(self, record: Record) -> Label:
        """A finished question; its path is None where the search found none."""
        with (self.folder / record.shard).open("rb") as file:
            file.seek(record.offset)
            return Label.of_row(json.loads(file.readline()))

    def _note(self, line: bytes, path: Path, offset: int) -> None:
        try:
            label = Label.of_row(json.loads(line))
            record = Record(
                set=label.set,
                position=self.selection.positions[label.question_id],
                kind=label.kind,
                base_correct=label.base_correct,
                inferences=label.inferences,
                simulations=label.simulations,
                layers_saved=0 if label.path is None else len(label.path) - sum(label.path),
                shard=path.name,
                offset=offset,
            )
        except (ValueError, KeyError, TypeError):
            with path.open("rb") as file:
                number = file.read(offset).count(b"\n") + 1
            raise UserError(
                f"{path}:{number}: not a finished question of this run; delete this line to search the question again"
            ) from None
        self.selection.add(label.question_id, record)


def label_of(searched: SearchedQuestion) -> Label:
    """A finished question as a row of its progress file, and of labels.jsonl if it is kept."""
    question, result = searched.prompt.question, searched.result
    return Label(
        question=question.text,
        path=result.best_path,
        answer=question.answer,
        set=question.set,
        question_id=question.id,
        kind=result.kind,
        prompt=searched.prompt.text,
        base_correct=result.base_correct,
        path_correct=result.best_path is not None,
        base_response=searched.base_response,
        path_response=searched.path_response,
        simulations=result.simulations,
        inferences=result.inferences,
        good_paths=result.good_paths,
    )


def finish(folder: Path, manifest: Manifest, progress: Progress) -> Manifest:
    """Writes the labels to keep to labels.jsonl, completes the manifest, and returns it."""
    selection = progress.selection
    kept = (progress.read(record) for _, record in selection.selected())
    return write_labels(folder, manifest, kept, table2=selection.table2(), shortfalls=selection.shortfalls())
