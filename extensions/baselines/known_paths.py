"""The known paths of the positive control (miniature/positive_control).

The control's base model was trained along one path per kind of question. A question file of the miniature says the kind
of each question; neither the model nor a router sees it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from drllm.errors import UserError
from drllm.questions.sets import SETS, Question
from extensions.baselines.interface import AnyPrompt
from miniature.training_paths import read_known_paths
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
        try:
            self._paths = read_known_paths(file)
        except (OSError, ValueError) as error:
            raise UserError(f"--known_paths: {error}") from None
        lengths = {len(path) for path in self._paths.values()}
        if lengths != {num_blocks}:
            raise UserError(f"--known_paths {file}: paths of {lengths.pop()} blocks, but the model has {num_blocks}")
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
