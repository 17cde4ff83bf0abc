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
from train_models.paths import Path as BlockPath


def known_paths(file: Path, data_dir: Path, num_blocks: int, questions: Sequence[Question]) -> list[BlockPath]:
    """The known path of each test question.

    Args:
        file: JSON, kind -> digits of the path.
        data_dir: question files of the miniature, whose rows name the kind.
        num_blocks: L of the model.
        questions: questions of the test split.

    Raises:
        UserError: the file is not valid, its paths are not of `num_blocks` blocks, or the question files do not hold a
            question or name no kind of the miniature.
    """
    paths = read_json(file, "write an object, kind -> digits of the path")
    for kind, digits in paths.items():
        if not (isinstance(digits, str) and len(digits) == num_blocks and set(digits) <= set("012")):
            raise UserError(
                f"--known_paths {file}: the path of {kind!r} is {digits!r}, expected {num_blocks} digits 0, 1 or 2, "
                "one per block"
            )
    kinds: dict[tuple, str] = {}
    for stem, split in {(SETS[question.set].stem, SETS[question.set].splits["test"]) for question in questions}:
        rows = map(json.loads, (data_dir / f"{stem}_{split}.jsonl").read_text().splitlines())
        kinds |= dict(map(_kind_of_row, rows))
    for question in questions:
        if kinds.get((question.text, question.choices)) not in paths:
            raise UserError(
                f"{data_dir}: no kind for the question {question.text!r}; make the files with "
                "`python miniature/make.py questions`"
            )
    return [tuple(map(int, paths[kinds[question.text, question.choices]])) for question in questions]


def _kind_of_row(row: dict) -> tuple[tuple[str, tuple[str, ...]], str]:
    """((text, options), kind) of a row as miniature.questions.row writes it."""
    if "choices" in row:
        return (row["question"], tuple(row["choices"]["text"])), row["id"].rsplit("-", 1)[1].replace("_", " ")
    return (row["query"], ()), row["query_metadata"]["subject"]
