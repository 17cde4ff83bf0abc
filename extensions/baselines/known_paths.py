"""The known paths of the positive control (miniature/positive_control).

The control's base model was trained along one path per kind of question. A question file of the miniature says the kind
of each question; neither the model nor a router sees it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from drllm.errors import UserError
from drllm.files import read_json
from drllm.questions.sets import SETS, Question
from drllm.rollouts.rewards import AnyPrompt
from train_models.paths import Path as BlockPath


class KnownPaths:
    """The known path of each question.

    Args:
        file: JSON, kind -> digits of the path.
        data_dir: question files of the miniature, whose rows name the kind.
        num_blocks: L of the model.

    Raises:
        UserError: the file is not valid or its paths are not of `num_blocks` blocks.
    """

    def __init__(self, file: Path, data_dir: Path, num_blocks: int) -> None:
        written = read_json(file, "write an object, kind -> digits of the path")
        for kind, digits in written.items():
            if not (isinstance(digits, str) and len(digits) == num_blocks and set(digits) <= set("012")):
                raise UserError(
                    f"--known_paths {file}: the path of {kind!r} is {digits!r}, expected {num_blocks} digits "
                    "0, 1 or 2, one per block"
                )
        self._paths = {kind: tuple(map(int, digits)) for kind, digits in written.items()}
        self._data_dir = data_dir
        self._kinds: dict[tuple[str, str], dict[tuple, str]] = {}

    def kind_of(self, question: Question, split: str) -> str:
        """The kind that the question file of `split` ("train" or "test") names.

        Raises:
            UserError: the file does not hold the question, or names no kind of the miniature.
        """
        kinds = self._kinds_of(question.set, split)
        kind = kinds.get((question.text, question.choices))
        if kind not in self._paths:
            raise UserError(
                f"{self._data_dir}: no kind for the question {question.text!r}; make the files with "
                "`python miniature/make.py questions`"
            )
        return kind

    def of(self, prompts: Sequence[AnyPrompt], split: str) -> list[BlockPath]:
        """The known path of each prompt's question."""
        return [self._paths[self.kind_of(prompt.question, split)] for prompt in prompts]

    def _kinds_of(self, set_name: str, split: str) -> dict[tuple, str]:
        spec = SETS[set_name]
        if (spec.stem, split) not in self._kinds:
            file = self._data_dir / f"{spec.stem}_{spec.splits[split]}.jsonl"
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            self._kinds[spec.stem, split] = dict(map(_kind_of_row, rows))
        return self._kinds[spec.stem, split]


def _kind_of_row(row: dict) -> tuple[tuple[str, tuple[str, ...]], str]:
    """((text, options), kind) of a row as miniature.questions.row writes it."""
    if "choices" in row:
        return (row["question"], tuple(row["choices"]["text"])), row["id"].rsplit("-", 1)[1].replace("_", " ")
    return (row["query"], ()), row["query_metadata"]["subject"]
