"""One search for a group of questions: planted paths are found, luck is not, and groups do not depend on each other."""

import random
from functools import cache

import pytest

from drllm.search.tree import PathSearch, SearchSettings
from extensions.groups.shared_search import SharedSettings, choose, search_groups
from train_models.paths import default_path

NUM_BLOCKS = 6
SIZE = 100  # questions of a group
DEFAULT = default_path(NUM_BLOCKS)
PLANTED = {0: (1, 1, 0, 1, 1, 1), 1: (1, 1, 1, 1, 2, 1), 2: DEFAULT}
GROUPS = {kind: list(range(SIZE * kind, SIZE * kind + SIZE)) for kind in PLANTED}
SETTINGS = SharedSettings(SearchSettings(num_simulations=200, exploration=0.1), search_questions=40, price=0.01)


@cache
def is_right(question: int, path) -> float:
    """A question's answer: right with a probability that falls with the edits that its kind does not want.

    By default it is 0.5, along the planted path of its kind 0.8; the third kind wants no edit.
    """
    planted = PLANTED[question // SIZE]
    wrong_edits = sum(visits not in (1, wanted) for visits, wanted in zip(path, planted, strict=True))
    has_planted = any(visits != 1 and visits == wanted for visits, wanted in zip(path, planted, strict=True))
    chance = max(0.0, 0.5 + 0.3 * has_planted - 0.4 * wrong_edits)
    return float(random.Random(f"{question} {path}").random() < chance)


class Measured:
    """Answers, and which were asked for."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.of_path: dict = {}

    def __call__(self, questions, paths):
        self.calls.append(len(questions))
        for question, path in zip(questions, paths, strict=True):
            self.of_path.setdefault(path, set()).add(question)
        return [is_right(question, path) for question, path in zip(questions, paths, strict=True)]


def test_each_group_gets_its_planted_path_and_one_without_keeps_the_default():
    labels = search_groups(GROUPS, NUM_BLOCKS, SETTINGS, Measured())
    assert {kind: label.path for kind, label in labels.items()} == PLANTED
    assert labels[0].gain == pytest.approx(0.3, abs=0.15)
    assert labels[0].error == pytest.approx(0.06, abs=0.02)
    assert (labels[2].gain, labels[2].error) == (0, 0)
    for kind, label in labels.items():
        assert label.questions == tuple(GROUPS[kind])
        assert label.simulations == 200, "no right answer ends the search of a group"


def test_a_label_by_single_answers_would_be_luck():
    """The published reward on the group without a better path: its searches find one for most wrong questions."""
    found = 0
    for question in GROUPS[2][:60]:
        settings = SharedSettings(SETTINGS.tree, search_questions=1, caution=0.0)
        label = search_groups({0: [question, question]}, NUM_BLOCKS, settings, Measured())[0]
        found += label.path != DEFAULT
    assert found > 30


def test_a_group_does_not_depend_on_the_groups_beside_it():
    together = search_groups(GROUPS, NUM_BLOCKS, SETTINGS, Measured())
    for kind, members in GROUPS.items():
        assert search_groups({kind: members}, NUM_BLOCKS, SETTINGS, Measured())[kind] == together[kind]
    other = SharedSettings(SETTINGS.tree, search_questions=40, seed=1)
    measured = [Measured(), Measured()]
    for settings, of_seed in zip((SETTINGS, other), measured, strict=True):
        search_groups({0: GROUPS[0]}, NUM_BLOCKS, settings, of_seed)
    assert list(measured[0].of_path) != list(measured[1].of_path)


def test_the_tree_sees_at_most_half_of_a_group_and_finalists_are_measured_on_all():
    measured = Measured()
    steps = []
    settings = SharedSettings(SETTINGS.tree, search_questions=20, finalists=2)
    search_groups({0: range(30)}, NUM_BLOCKS, settings, measured, steps.append)
    assert sum(steps) == 200 + 2
    assert set(measured.calls[:-3]) == {15}
    assert measured.calls[-3:] == [30] * 3, "the default path and two others"
    search_groups({0: range(100)}, NUM_BLOCKS, settings, measured := Measured())
    assert set(measured.calls[:-3]) == {20}
    assert sum(len(asked) == 100 for asked in measured.of_path.values()) == 3


def test_the_tree_is_told_the_mean_reward(monkeypatch):
    told, means = [], []
    tell = PathSearch.tell
    monkeypatch.setattr(PathSearch, "tell", lambda search, reward: (told.append(reward), tell(search, reward)))

    def measure(questions, paths):
        rewards = [question / 100 for question in questions]
        means.append(sum(rewards) / len(rewards))
        return rewards

    settings = SharedSettings(SearchSettings(num_simulations=5), search_questions=7)
    search_groups({0: range(20)}, NUM_BLOCKS, settings, measure)
    assert told == pytest.approx(means[:6])
    assert len(told) == 6


def test_a_gain_must_exceed_its_price_and_its_error():
    skip, repeat = (0, 1), (1, 2)
    base = [0.0, 1.0] * 50
    better = [1.0, 1.0] * 10 + [0.0, 1.0] * 40  # a gain of 0.1 with a standard error of 0.0302
    measured = {(1, 1): base, skip: base, repeat: better}

    def chosen(price, caution):
        return choose(measured, (1, 1), SharedSettings(price=price, caution=caution))

    assert chosen(price=0.0, caution=0.0) == (repeat, pytest.approx(0.1), pytest.approx(0.0302, abs=1e-4))
    assert chosen(price=0.0, caution=3.4)[0] == (1, 1)
    assert chosen(price=0.04, caution=0.0)[0] == repeat
    assert chosen(price=0.06, caution=0.0)[0] == skip, "a shorter path that is as good"


def test_a_single_question_chooses_no_path():
    assert search_groups({0: [5]}, NUM_BLOCKS, SETTINGS, Measured())[0].path == DEFAULT
