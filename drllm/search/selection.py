"""Which questions are searched, in which order, and which of the labels found are kept.

Each set's questions are searched in a seeded order. Of those whose best path teaches something, the first
`round(share * samples)` wrong-to-right ones and the first `samples - that` shorter ones are kept. Which questions are
kept depends on the order alone, not on the number of processes, the batch size or the order of arrival; questions that
were searched beyond what was needed are ignored.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from drllm.labels import SHORTER, WRONG_TO_RIGHT
from drllm.questions.sets import Question


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
