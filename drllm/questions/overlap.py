"""Training questions that a test set repeats in other words.

ARC, OpenBookQA and CommonsenseQA share questions, within and between sets. A training question that a test question
repeats tells nothing about unseen questions, so it is dropped before anything is searched, trained or chosen on it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from drllm.errors import UserError
from drllm.questions.sets import Question, load_questions

SHINGLE = 3  # words
THRESHOLD = 0.6  # shared part of the shingles of both texts, from which on they count as one question


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """The runs of three words of `text`, lower case and without punctuation; one run where there are fewer words."""
    words = re.findall(r"[^\W_]+", text.lower())
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


def near_duplicates(
    questions: Sequence[Question], others: Iterable[Question], threshold: float = THRESHOLD
) -> dict[str, str]:
    """The questions whose text nearly repeats one of `others`: their id -> the id of the closest other one.

    Two texts are near duplicates if the Jaccard index of their shingles is at least `threshold`. Options are not
    compared: a question asked again with other options counts, too.
    """
    index: dict[tuple[str, ...], list[int]] = defaultdict(list)
    ids, sizes = [], []
    for number, other in enumerate(others):
        own = shingles(other.text)
        ids.append(other.id)
        sizes.append(len(own))
        for shingle in own:
            index[shingle].append(number)
    duplicates = {}
    for question in questions:
        own = shingles(question.text)
        shared = Counter(number for shingle in own for number in index.get(shingle, ()))
        overlap = {number: both / (len(own) + sizes[number] - both) for number, both in shared.items()}
        closest = max(overlap, key=overlap.__getitem__, default=None)
        if closest is not None and overlap[closest] >= threshold:
            duplicates[question.id] = ids[closest]
    return duplicates


def load_training_questions(
    sets: Sequence[str], data_dir: Path | str | None = None, unlike: Sequence[str] = ()
) -> dict[str, list[Question]]:
    """The training questions of each set that do not nearly repeat a test question of the sets `unlike`.

    Raises:
        UserError: see `load_questions`; and if a set has no question left.
    """
    tests = [question for name in unlike for question in load_questions(name, "test", data_dir)]
    questions = {}
    for name in sets:
        of_set = load_questions(name, "train", data_dir)
        dropped = near_duplicates(of_set, tests)
        questions[name] = [question for question in of_set if question.id not in dropped]
        if not questions[name]:
            raise UserError(f"every training question of {name} nearly repeats a test question of {', '.join(unlike)}")
    return questions
