"""Which questions are searched, in which order, and which of the resulting labels are kept.

The questions of each set are searched in a seeded order. The first quota of `drllm.search.quotas.allocate` is the
wanted number of labels and share of wrong-to-right ones for every set. A set is searched until both of its quotas are
filled or its questions are used up. If questions are used up, what they cannot give is allocated anew to kinds and sets
that may have more, and the search enters its next stage, until all slots are filled or no question is left.

Of each set and kind the first labels in the seeded order are kept. The result depends only on that order and on what
each search finds, not on the number of processes, the batch size or the order of arrival: labels beyond a quota are
ignored, and a stage ends only when all questions that could change it have been searched.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from drllm.labels import SHORTER, WRONG_TO_RIGHT
from drllm.questions.sets import Question
from drllm.rollouts.rewards import AnyPrompt
from drllm.search.quotas import KINDS, Cell, allocate


def seeded_order(questions: Sequence[Question], seed: int) -> list[Question]:
    """`questions` in the order in which they are searched: by a hash of the seed and the question's id."""
    return sorted(questions, key=lambda question: hashlib.sha256(f"{seed} order {question.id}".encode()).digest())


def digest_of(questions: Sequence[Question]) -> str:
    """A hash of the questions and their answers, so that a run is not resumed with other data."""
    content = hashlib.sha256()
    for question in sorted(questions, key=lambda question: question.id):
        content.update(f"{question.id} {question.answer}\n".encode())
    return content.hexdigest()[:16]


class Record(NamedTuple):
    """The part of a finished question that is kept in memory; its line starts at byte `offset` of `shard`."""

    set: str
    position: int  # in the seeded order of the set
    kind: str | None
    base_correct: bool
    inferences: int
    simulations: int
    layers_saved: int
    shard: str
    offset: int

    @property
    def is_searched(self) -> bool:
        """False where only the default path was evaluated, because a label of that kind was not wanted then."""
        return self.simulations > 0

    @property
    def possible_kind(self) -> str:
        """The kind of label that the question gives if it gives one."""
        return SHORTER if self.base_correct else WRONG_TO_RIGHT


@dataclass(frozen=True)
class Stage:
    """What all processes must agree on before they search on.

    Attributes:
        quotas: {set: {kind: labels to keep}}.
        searched: ids of the questions that need no further search.
        is_last: nothing is left to search; the quotas are final.
    """

    quotas: dict[str, dict[str, int]]
    searched: frozenset[str]
    is_last: bool


class Selection:
    """The finished questions of all sets, and which are still wanted.

    Args:
        orders: the questions of each set in seeded order.
        samples: wanted labels per set.
        share: target share of wrong-to-right labels over all sets.
    """

    def __init__(self, orders: dict[str, list[Question]], samples: dict[str, int], share: float) -> None:
        self.orders = orders
        self.samples = samples
        self.share = share
        self.quotas = allocate(samples, share, {})
        self.positions = {question.id: index for order in orders.values() for index, question in enumerate(order)}
        self.records: dict[str, Record] = {}
        self.visited: Counter[str] = Counter()  # finished questions of each set
        self._labels: dict[Cell, list[int]] = {}  # sorted positions of the questions that gave a label

    def add(self, question_id: str, record: Record) -> None:
        """Adds a finished question. A second record is ignored, unless only the second one was searched."""
        previous = self.records.get(question_id)
        if previous is None:
            self.visited[record.set] += 1
        elif previous.is_searched or not record.is_searched:
            return
        self.records[question_id] = record
        if record.kind is not None:
            bisect.insort(self._labels.setdefault((record.set, record.kind), []), record.position)

    def is_wanted(self, question: Question, kind: str) -> bool:
        """Whether `question` could still be kept as `kind`: not if enough questions before it gave that kind."""
        positions = self._labels.get((question.set, kind), [])
        return bisect.bisect_left(positions, self.positions[question.id]) < self.quotas[question.set][kind]

    def is_wanted_as(self, prompt: AnyPrompt, base_correct: bool) -> bool:
        """Whether the question could still be kept, once it is known whether its default path is right."""
        return self.is_wanted(prompt.question, SHORTER if base_correct else WRONG_TO_RIGHT)

    def remaining(
        self, rank: int = 0, num_processes: int = 1, searched: Collection[str] | None = None
    ) -> Iterator[Question]:
        """The questions that process `rank` searches in this stage, in order.

        `searched` (default: from this process's records) must be the same in all processes, or some questions would be
        searched by none. Whether a question is still wanted is decided when it is yielded, so late results count.
        """
        if searched is None:
            searched = self._searched_ids()
        questions = (question for order in self.orders.values() for question in order)
        open_questions = [question for question in questions if question.id not in searched]
        return (question for question in open_questions[rank::num_processes] if self._is_open(question))

    def next_stage(self) -> Stage:
        """The stage that the records call for: the first whose quotas are not yet settled, or the last one."""
        first_open = {(name, kind): self._first_open(name, kind) for name in self.orders for kind in KINDS}
        existing: dict[Cell, int] = {}
        while True:
            quotas = allocate(self.samples, self.share, existing)
            exhausted: dict[Cell, int] = {}
            is_settled = True
            for cell, position in first_open.items():
                positions = self._labels.get(cell, [])
                quota = quotas[cell[0]][cell[1]]
                if position is None:
                    if len(positions) < quota:
                        exhausted[cell] = len(positions)
                elif bisect.bisect_left(positions, position) < quota:
                    is_settled = False
            if not is_settled or not exhausted:
                return Stage(quotas, frozenset(self._searched_ids()), is_settled)
            existing |= exhausted

    def selected(self) -> list[tuple[str, Record]]:
        """(question id, record) of the labels to keep, sorted by set and id."""
        kept = []
        for question_id, record in self.records.items():
            if record.kind is not None:
                positions = self._labels[record.set, record.kind]
                if bisect.bisect_left(positions, record.position) < self.quotas[record.set][record.kind]:
                    kept.append((question_id, record))
        return sorted(kept, key=lambda item: (item[1].set, item[0]))

    def table2(self) -> list[dict[str, Any]]:
        """One row per set in the form of the paper's Table 2, with additional columns."""
        rows = []
        kept = self.selected()
        for name, order in self.orders.items():
            visited = [record for record in self.records.values() if record.set == name]
            sampled = [record for _, record in kept if record.set == name]
            rows.append(
                {
                    "set": name,
                    "original": len(order),
                    "wanted": self.samples[name],
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

    def surplus(self) -> tuple[int, int]:
        """(questions, simulations) that the quotas did not need: one question after the other would not take them."""
        questions = simulations = 0
        for question in (question for order in self.orders.values() for question in order):
            if (record := self.records.get(question.id)) is None:
                continue
            questions += not any(self.is_wanted(question, kind) for kind in KINDS)
            simulations += record.simulations * (not self.is_wanted(question, record.possible_kind))
        return questions, simulations

    def shortfalls(self) -> list[dict[str, Any]]:
        """The quotas of the first stage that could not be filled, each with the questions that could have filled it.

        Keys: set, kind, quota, labels (all that exist), candidates (searched questions whose default answer allows that
        kind), visited.
        """
        rows = []
        for name, kinds in allocate(self.samples, self.share, {}).items():
            visited = [record for record in self.records.values() if record.set == name]
            for kind, quota in kinds.items():
                labels = len(self._labels.get((name, kind), []))
                if labels < quota and self._first_open(name, kind) is None:
                    candidates = sum(record.possible_kind == kind for record in visited)
                    row = {"set": name, "kind": kind, "quota": quota, "labels": labels}
                    rows.append(row | {"candidates": candidates, "visited": len(visited)})
        return rows

    def expected_visits(self) -> int:
        """Estimated number of visited questions at the end, from the shares of labels so far."""
        expected = 0
        for name, order in self.orders.items():
            visited = self.visited[name]
            needed = 0.0
            for kind, quota in self.quotas[name].items():
                labels = len(self._labels.get((name, kind), []))
                if labels >= quota:
                    needed = max(needed, visited)
                else:
                    needed = max(needed, visited * quota / labels if labels else len(order))
            expected += min(len(order), int(needed))
        return expected

    def _searched_ids(self) -> set[str]:
        return {question_id for question_id, record in self.records.items() if record.is_searched}

    def _is_open(self, question: Question) -> bool:
        """Whether a search of `question` could still give a label that is kept."""
        record = self.records.get(question.id)
        if record is None:
            return any(self.is_wanted(question, kind) for kind in KINDS)
        return not record.is_searched and self.is_wanted(question, record.possible_kind)

    def _first_open(self, name: str, kind: str) -> int | None:
        """Position of the first question of a set that may still give a label of `kind`; None if there is none."""
        for position, question in enumerate(self.orders[name]):
            record = self.records.get(question.id)
            if record is None or (not record.is_searched and record.possible_kind == kind):
                return position
        return None
