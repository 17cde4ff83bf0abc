"""Answers of a model with the compute they took, in memory and optionally on disk."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import hash_args

from drllm.errors import UserError
from drllm.evaluation.layer_counts import Measurement
from drllm.files import disk_errors

SAFE = "the answers so far are kept"
# An answer, and the measurement of a request or those of its windows (loglikelihood_rolling).
Entry = tuple[Any, Measurement | list[Measurement]]


class ResponseCache:
    """Stands in for lm-eval's cache hook: pairs every answer with what it took.

    With a file, answers are kept in SQLite as JSON text, one row per request, committed one by one: a killed process
    loses the batch in hand. Reading a cache file never executes anything from it.

    Args:
        path: the SQLite file; None keeps answers in memory until `forget`.
        identity: a hash of everything that an answer depends on, other than the request.

    Raises:
        UserError: the file cannot be written or is not a response cache.
    """

    def __init__(self, path: str | Path | None, identity: str) -> None:
        self._identity = identity
        self._path = None if path is None else Path(path)
        self._in_memory: dict[str, Entry] = {}
        self._drawn: dict[str, deque[Entry]] = defaultdict(deque)  # sampled requests: every repeat has its own answer
        self.pending: deque[Measurement] = deque()  # of the rows that lm-eval is about to report, in order
        if self._path is not None:
            with disk_errors(self._path, SAFE):
                self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._database = sqlite3.connect(self._path, isolation_level=None)
                # A power failure may cost the file, a killed process does not.
                self._database.execute("PRAGMA synchronous = OFF")
            except sqlite3.Error as error:
                raise self._unusable(error) from None
            self._execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, entry TEXT NOT NULL)")

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        """Called by lm-eval with every answer."""
        if self.pending:
            measurement = self.pending.popleft()
            if is_sampled(kind, arguments):
                self._drawn[self._key(kind, arguments)].append((answer, measurement))
            else:
                self.put(kind, arguments, answer, measurement)

    def get(self, kind: str, arguments: Sequence[Any]) -> Entry | None:
        """The answer and its measurement (a list of them for loglikelihood_rolling), None when unknown."""
        key = self._key(kind, arguments)
        if is_sampled(kind, arguments):
            return self._drawn[key].popleft() if self._drawn[key] else None
        if self._path is None:
            return self._in_memory.get(key)
        row = self._execute("SELECT entry FROM answers WHERE key = ?", (key,))
        return None if row is None else self._decode(row[0])

    def put(
        self, kind: str, arguments: Sequence[Any], answer: Any, measurement: Measurement | list[Measurement]
    ) -> None:
        """Stores an answer with its measurement."""
        key = self._key(kind, arguments)
        if self._path is None:
            self._in_memory[key] = (answer, measurement)
            return
        rows = measurement if isinstance(measurement, list) else [measurement]
        entry = {"answer": answer, "windows": isinstance(measurement, list)}
        entry["measurements"] = [dataclasses.astuple(row) for row in rows]
        self._execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(entry)))

    def forget(self) -> None:
        """Drops the answers to the current requests, unless they are on disk."""
        self._in_memory = {}

    def _key(self, kind: str, arguments: Sequence[Any]) -> str:
        return f"{self._identity}:{hash_args(kind, arguments)}"

    def _decode(self, text: Any) -> Entry:
        try:
            entry = json.loads(text)
            answer = entry["answer"]
            measurements = [Measurement(*fields) for fields in entry["measurements"]]
            if not all(map(_is_well_formed, measurements)):
                raise ValueError("a damaged entry")
            return (
                tuple(answer) if isinstance(answer, list) else answer,  # (log-likelihood, is greedy)
                measurements if entry["windows"] else measurements[0],
            )
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise self._unusable(error) from None

    def _execute(self, statement: str, values: tuple[str, ...] = ()) -> tuple[Any, ...] | None:
        """The first row of the result."""
        try:
            return self._database.execute(statement, values).fetchone()
        except sqlite3.OperationalError as error:  # a full disk, a missing permission, a lock
            raise UserError(
                f"cannot write the response cache {self._path} ({error}); {SAFE}: make room, or check that the folder "
                "is writable, and run the same command to resume"
            ) from None
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> UserError:
        return UserError(f"{self._path} is not a response cache of this program ({error}); delete it or name another")


def is_sampled(kind: str, arguments: Sequence[Any]) -> bool:
    """Whether the same request may get another answer; reads the arguments as lm-eval's normalize_gen_kwargs does."""
    if kind != "generate_until":
        return False
    sampling = arguments[1].get("do_sample")
    return float(arguments[1].get("temperature") or 0) > 0 if sampling is None else bool(sampling)


def _is_well_formed(measurement: Measurement) -> bool:
    counts = (measurement.prefill_blocks, measurement.blocks, measurement.passes)
    return (
        isinstance(measurement.context, str | None)
        and isinstance(measurement.path, str)
        and set(measurement.path) <= set("012")
        and all(isinstance(count, int) for count in counts)
    )
