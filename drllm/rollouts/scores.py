"""Scores of many questions along many paths, kept on disk as they are measured.

A store is a folder of JSON Lines files, one per process; a line holds the scores of one question along one path. A
stopped run loses at most the batch in hand, nothing is scored twice, and several processes share the work.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path as FilePath

from tqdm import tqdm

from drllm.errors import UserError
from drllm.files import disk_errors, read_json, write_json
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.questions.prompts import Prompt
from drllm.rollouts.engine import Request, RolloutEngine
from drllm.rollouts.likelihood import LikelihoodEngine
from train_models.paths import EXECUTE, Path

Scores = tuple[float, ...]  # what an engine's `score` leaves for one question and path


def path_text(path: Path) -> str:
    """One digit per block, e.g. "1101112"."""
    return "".join(map(str, path))


class ScoreStore:
    """Scores by question id and path, in memory and in `folder`.

    Args:
        folder: created if missing; on a disk that all processes see.
        key: what the scores depend on besides question and path (weights, dtype); a folder of another key is refused.
        rank: number of this process; None only reads.

    Raises:
        UserError: the folder belongs to another key, cannot be written, or holds a damaged line that is not its last.
    """

    def __init__(self, folder: FilePath, key: dict, rank: int | None = 0) -> None:
        self.folder = folder
        self.key = key
        self._scores: dict[tuple[str, str], Scores] = {}
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / "scores.json"
        if manifest.exists():
            if (other := read_json(manifest, "name another folder")) != key:
                raise UserError(f"{folder} holds scores of {other}, not of {key}; name another folder")
        elif rank == 0:
            write_json(manifest, key)
        self.update()
        if rank is None:
            return
        self._path = folder / f"{rank:05d}.jsonl"
        with disk_errors(self._path):
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115  (closed with the process)
            self._file.truncate(self._complete_bytes(self._path))

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, question_id: str, path: Path) -> Scores | None:
        """What the engine left (log-likelihoods in nats, or whether a response is right); None where it is unknown."""
        return self._scores.get((question_id, path_text(path)))

    def add(self, rows: Iterable[tuple[str, Path, Scores]]) -> None:
        """Appends (question id, path, scores); they outlive this process at once."""
        lines = []
        for question_id, path, scores in rows:
            # As a resumed run reads them, so that it decides alike.
            kept = self._scores[question_id, path_text(path)] = tuple(round(value, 5) for value in scores)
            lines.append(json.dumps([question_id, path_text(path), kept]) + "\n")
        with disk_errors(self._path, f"{len(self)} scores are safe"):
            self._file.write("".join(lines).encode())

    def update(self) -> None:
        """Reads what all processes have written."""
        for path in sorted(self.folder.glob("*.jsonl")):
            for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
                if not line.endswith(b"\n"):
                    break  # cut off by a kill
                try:
                    question_id, digits, scores = json.loads(line)
                    self._scores[question_id, digits] = tuple(map(float, scores))
                except (ValueError, TypeError):
                    raise UserError(f"{path}:{number}: not a line of scores; delete it to measure it again") from None

    @staticmethod
    def _complete_bytes(path: FilePath) -> int:
        content = path.read_bytes() if path.exists() else b""
        return content.rfind(b"\n") + 1


def score_all(
    engine: RolloutEngine | LikelihoodEngine,
    work: Sequence[tuple[Prompt | LikelihoodPrompt, Sequence[Path]]],
    store: ScoreStore,
    title: str | None,
    rank: int = 0,
    num_processes: int = 1,
) -> None:
    """Scores each question along its paths, as far as `store` does not hold them.

    Questions of one batch go through their paths together, so that paths which begin alike share their first blocks.
    `title` names the progress bar of the first process; None: no bar.
    """
    size = engine.batch_size
    work = sorted(work, key=lambda pair: pair[0].total_tokens)  # neighbours need little padding
    chunks = [work[start : start + size] for start in range(0, len(work), size)][rank::num_processes]

    def missing(prompt: Prompt | LikelihoodPrompt, paths: Sequence[Path]) -> list[Path]:
        return [path for path in dict.fromkeys(paths) if store.get(prompt.question.id, path) is None]

    total = sum(len(missing(prompt, paths)) for chunk in chunks for prompt, paths in chunk)
    with tqdm(total=total, desc=title, unit="score", disable=rank > 0 or title is None, mininterval=1) as progress:
        for chunk in chunks:
            # The default path comes first: an engine that keeps its states starts the others at their first edit.
            waiting = [
                (prompt, sorted(missing(prompt, paths), key=lambda path: (set(path) != {EXECUTE}, path), reverse=True))
                for prompt, paths in chunk
            ]
            while any(paths for _, paths in waiting):
                requests = [Request(prompt, paths.pop()) for prompt, paths in waiting if paths]
                scores = engine.score(requests)
                store.add((r.prompt.question.id, r.path, s) for r, s in zip(requests, scores, strict=True))
                progress.update(len(requests))
            for prompt, _ in chunk:
                engine.forget(prompt.question)
