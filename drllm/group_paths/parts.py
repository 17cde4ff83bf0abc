"""Which training questions choose paths, and which further ones validate them: the same in every program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drllm.questions.overlap import load_training_questions
from drllm.questions.per_set import numbers_per_set
from drllm.questions.sets import Question, expand_sets
from drllm.search.selection import seeded_order

TRAIN, VALIDATION = "--train_questions", "--validation_questions"
DEFAULT_TRAIN, DEFAULT_VALIDATION = "800", "0"


@dataclass(frozen=True)
class Parts:
    """Sizes of the parts of the training questions.

    Attributes:
        train, validation: most questions of each set.
    """

    train: dict[str, int]
    validation: dict[str, int]

    @classmethod
    def of(cls, sets: Sequence[str], train: str = DEFAULT_TRAIN, validation: str = DEFAULT_VALIDATION) -> Parts:
        """The sizes that the command line gives: a number for all sets, or "name=number,..." (the rest: the default).

        Raises:
            UserError: another form, a number below 1, or a set outside `sets`.
        """
        given = numbers_per_set(TRAIN, train, sets, DEFAULT_TRAIN)
        validating = numbers_per_set(VALIDATION, validation, sets, DEFAULT_VALIDATION)
        return cls(
            dict.fromkeys(sets, int(DEFAULT_TRAIN)) | given, dict.fromkeys(sets, int(DEFAULT_VALIDATION)) | validating
        )

    def split(
        self, data_dir: Path | None, unlike: str = "", seed: int = 0
    ) -> dict[str, tuple[list[Question], list[Question]]]:
        """(training questions, validation questions) of each set, the first ones of the order that `seed` draws.

        Args:
            data_dir: local question files; None: the Hub.
            unlike: sets, comma-separated, none of whose test questions a question may nearly repeat.
            seed: of the order of questions.
        """
        questions = load_training_questions(tuple(self.train), data_dir, expand_sets(unlike) if unlike else ())
        split = {}
        for name, of_set in questions.items():
            ordered, first = seeded_order(of_set, seed), self.train[name]
            split[name] = (ordered[:first], ordered[first : first + self.validation[name]])
        return split
