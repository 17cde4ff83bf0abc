"""The label store: finished questions on disk at once, a deterministic selection, and files that training can trust.

A folder of labels holds

    manifest.json            what the labels belong to: model, dtype, arguments, versions, Table 2
    progress/00000.jsonl     finished questions, appended as they finish, one file a process
    labels.jsonl             the selected labels, written whole at the end

A killed run loses at most the questions in flight. The same command continues with any number of processes: it reads
all progress files, and a process appends to its own. Another command is refused with the difference named.

The selection: each set's questions are searched in a seeded order. Of those whose best path teaches something, the
first `round(share * samples)` wrong-to-right ones and the first `samples - that` shorter ones are kept. A kind that
runs out is not made up for by the other. Which questions are kept so depends on the order alone, not on the processes,
the batch size or the order of arrival; questions that were searched beyond what was needed are ignored.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from drllm.errors import UserError
from drllm.rollout import SearchedQuestion
from drllm.tasks import Question
from train_models.paths import check_path

FORMAT = 1
MAY_DIFFER = {"model", "revision", "data_dir", "versions", "commit", "labels", "table2"}  # fingerprints say more
WRONG_TO_RIGHT, SHORTER = "wrong_to_right", "shorter"
SYNC_EVERY_S = 1.0

# --------------------------------------------------------------------------------------------------------
# Which questions, in which order, and which of them are kept


def seeded_order(questions: Sequence[Question], seed: int) -> list[Question]:
    """`questions` in the order in which they are searched: that of a hash of the seed and the question's id."""
    return sorted(questions, key=lambda question: hashlib.sha256(f"{seed} order {question.id}".encode()).digest())


def digest_of(questions: Sequence[Question]) -> str:
    """A hash of the questions with their answers, so that a run is not continued with other data."""
    content = hashlib.sha256()
    for question in sorted(questions, key=lambda question: question.id):
        content.update(f"{question.id} {question.answer}\n".encode())
    return content.hexdigest()[:16]


class Record(NamedTuple):
    """What is kept in memory of one finished question; its line is at `offset` of `shard`."""

    set: str
    position: int
    kind: str | None
    base_correct: bool
    inferences: int
    simulations: int
    layers_saved: int
    shard: str
    offset: int


class Selection:
    """The finished questions of all sets, and what is still wanted.

    Args:
        orders: the questions of each set in seeded order.
        samples: how many labels to keep of each set.
        share: of them, the share of wrong-to-right ones.
    """

    def __init__(self, orders: dict[str, list[Question]], samples: dict[str, int], share: float) -> None:
        self.orders = orders
        self.quotas = {
            name: {WRONG_TO_RIGHT: round(share * count), SHORTER: count - round(share * count)}
            for name, count in samples.items()
        }
        self.positions = {question.id: place for order in orders.values() for place, question in enumerate(order)}
        self.records: dict[str, Record] = {}
        self.visited: Counter[str] = Counter()  # finished questions of each set
        self._found: dict[tuple[str, str], list[int]] = {}  # (set, kind) -> sorted positions

    def add(self, question_id: str, record: Record) -> None:
        """Notes a finished question; a second record of it is ignored."""
        if question_id in self.records:
            return
        self.records[question_id] = record
        self.visited[record.set] += 1
        if record.kind is not None:
            bisect.insort(self._found.setdefault((record.set, record.kind), []), record.position)

    def is_wanted(self, question: Question, kind: str) -> bool:
        """Whether `question` could still be selected as `kind`: not if enough questions before it are of that kind."""
        found = self._found.get((question.set, kind), [])
        return bisect.bisect_left(found, self.positions[question.id]) < self.quotas[question.set][kind]

    def remaining(
        self, rank: int = 0, num_processes: int = 1, finished: Collection[str] | None = None
    ) -> Iterator[Question]:
        """The questions that process `rank` searches, in order.

        `finished`, by default the ids of the own records, must be the same in all processes, or some questions would
        be nobody's. Whether a question is still wanted is asked at the last moment, so that late results spare it.
        """
        everything = (question for order in self.orders.values() for question in order)
        finished = self.records if finished is None else finished
        unfinished = [question for question in everything if question.id not in finished]
        return (
            question
            for question in unfinished[rank::num_processes]
            if self.is_wanted(question, WRONG_TO_RIGHT) or self.is_wanted(question, SHORTER)
        )

    def selected(self) -> list[tuple[str, Record]]:
        """(question id, record) of the labels to keep, by set and id."""
        kept = []
        for question_id, record in self.records.items():
            if record.kind is not None:
                found = self._found[record.set, record.kind]
                if bisect.bisect_left(found, record.position) < self.quotas[record.set][record.kind]:
                    kept.append((question_id, record))
        return sorted(kept, key=lambda item: (item[1].set, item[0]))

    def table2(self) -> list[dict[str, Any]]:
        """A row a set in the form of the paper's Table 2, with what was found."""
        rows = []
        kept = self.selected()
        for name, order in self.orders.items():
            visited = [record for record in self.records.values() if record.set == name]
            sampled = [record for _, record in kept if record.set == name]
            rows.append(
                {
                    "set": name,
                    "original": len(order),
                    "wanted": sum(self.quotas[name].values()),
                    "sampled": len(sampled),
                    WRONG_TO_RIGHT: sum(record.kind == WRONG_TO_RIGHT for record in sampled),
                    "visited": len(visited),
                    "base_correct": sum(record.base_correct for record in visited),
                    "simulations": sum(record.simulations for record in visited),
                    "inferences": sum(record.inferences for record in visited),
                    "layers_saved": sum(record.layers_saved for record in sampled) / max(len(sampled), 1),
                }
            )
        return rows

    def expected_visits(self) -> int:
        """About how many questions will have been visited at the end, from the shares found so far."""
        expected = 0
        for name, order in self.orders.items():
            visited = self.visited[name]
            needed = 0.0
            for kind, quota in self.quotas[name].items():
                found = len(self._found.get((name, kind), []))
                needed = max(needed, visited if found >= quota else visited * quota / found if found else len(order))
            expected += min(len(order), int(needed))
        return expected


# --------------------------------------------------------------------------------------------------------
# Progress files


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


# --------------------------------------------------------------------------------------------------------
# The folder


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
    _write_whole(path, [_pretty(manifest)])


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

    _write_whole(folder / "labels.jsonl", lines())
    _write_whole(folder / "manifest.json", [_pretty(manifest)])
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a folder of labels. UserError when there is none or it cannot be read."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; make the labels with data_generation.py") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); is the file cut off?") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of format {FORMAT}; make the labels anew with data_generation.py")
    return manifest


def _pretty(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n"


def _write_whole(path: Path, parts: Sequence[bytes] | Iterator[bytes]) -> None:
    """Writes a file so that it is there whole or not at all."""
    draft = path.with_name(path.name + ".draft")
    with disk_errors(path):
        with draft.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)


@contextlib.contextmanager
def disk_errors(path: Path, safe: str = "what was finished is safe") -> Iterator[None]:
    """Turns a full disk and its like into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"no room left to write {path} ({error.strerror}); {safe}: make room and repeat the command"
            ) from error
        raise UserError(f"cannot write {path} ({error.strerror or error}); {safe}") from error


# --------------------------------------------------------------------------------------------------------
# Reading labels for training


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
