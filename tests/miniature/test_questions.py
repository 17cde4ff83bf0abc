"""The miniature's questions: no content in two parts, reproducible from the seed, with right answers."""

import json
import random
import re
import statistics

import pytest

from drllm.errors import UserError
from drllm.questions.grading import grade
from drllm.questions.prompts import render_prompt
from drllm.questions.sets import load_questions
from miniature import questions as miniature_questions
from miniature.make import HERE
from miniature.pretraining import batches, fewer_options
from miniature.questions import (
    CATEGORIES,
    KINDS,
    LABELS,
    LARGEST_NUMBER,
    SETS,
    Question,
    part_of,
    questions,
    write_questions,
)

DATA = HERE / "data"
FILES = ("arc_easy", "arc_challenge", "dart_math")
TRAIN, TEST = 800, 400


def rows(stem: str, part: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{stem}_{part}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def drawn() -> dict[tuple[str, str], list[Question]]:
    """The questions of the files, generated again from the seed."""
    numbers = {"train": TRAIN, "test": TEST}
    return {(s, part): questions(s, part, n, seed=0) for s in SETS for part, n in numbers.items()}


@pytest.mark.parametrize("part", ["train", "test"])
def test_files_have_the_schemas_of_the_hub(part):
    for stem in ("arc_easy", "arc_challenge"):
        for r in rows(stem, part):
            assert set(r) == {"id", "question", "choices", "answerKey"}
            assert r["choices"]["label"] == ["A", "B", "C", "D"]
            assert len(set(r["choices"]["text"])) == 4
            assert r["answerKey"] in r["choices"]["label"]
    for r in rows("dart_math", part):
        assert set(r) == {"query", "gt_ans", "query_metadata"}
        assert 0 <= int(r["gt_ans"]) <= LARGEST_NUMBER
        assert r["query_metadata"]["level"] in range(1, 6)
        assert {"subject", "id"} < set(r["query_metadata"])


@pytest.mark.parametrize("part", ["train", "test"])
def test_ids_are_unique(part):
    for stem in ("arc_easy", "arc_challenge"):
        ids = [r["id"] for r in rows(stem, part)]
        assert len(set(ids)) == len(ids)
    ids = [r["query_metadata"]["id"] for r in rows("dart_math", part)]
    assert len(set(ids)) == len(ids)


def test_files_come_out_again_from_the_seed(tmp_path):
    write_questions(tmp_path, TRAIN, TEST, seed=0)
    for stem in FILES:
        for part in ("train", "test"):
            name = f"{stem}_{part}.jsonl"
            assert (tmp_path / name).read_text() == (DATA / name).read_text(), name


def test_no_content_is_in_two_parts(drawn):
    """Search, test and what the base model saw are disjoint by content, over all sets together."""
    keys = {part: {q.key for (_, p), asked in drawn.items() if p == part for q in asked} for part in ("train", "test")}
    keys["pretrain"] = {q.key for batch, _ in batches(seed=0, start=0, steps=10, size=2_000) for q in batch}
    assert len(keys["pretrain"]) > 10_000
    for a, b in (("train", "test"), ("train", "pretrain"), ("test", "pretrain")):
        assert not keys[a] & keys[b]
    for part, contents in keys.items():
        assert {part_of(key) for key in contents} == {part}


def normalised(question: Question) -> tuple:
    """A question's content read off its text alone: numbers, lexicon words and options, sorted; wording dropped."""
    words = "".join(c if c.isalnum() else " " for c in question.text).split()
    lexicon = {w for group in CATEGORIES.values() for w in group}
    content = sorted(w for w in words if w.isdigit() or w in lexicon)
    return question.kind, tuple(content), tuple(sorted(question.choices))


def test_the_files_of_the_comparison_with_controls_share_no_content():
    """`make compare` searches, trains and validates on 1,900 questions per set, and tests on 1,900 others."""
    keys = {part: {q.key for name in SETS for q in questions(name, part, 1900, seed=0)} for part in ("train", "test")}
    assert len(keys["test"]) > 10_000
    assert not keys["train"] & keys["test"]
    assert {part_of(key) for key in keys["test"]} == {"test"}


def test_keys_tell_contents_apart_no_finer_than_the_text(drawn):
    """No key can split one content over two parts: contents compared by text, whatever order the words are in."""
    # Kinds in which the order of the numbers is part of the content; for these the text itself is compared.
    ordered = {"double, add", "remainder", "multiply, add", "add, multiply", "add, subtract", "larger, add",
               "count", "larger sum", "difference of products", "story sum", "story difference", "larger",
               "closest"}  # fmt: skip
    parts: dict[str, set] = {}
    for (_, part), asked in drawn.items():
        contents = ((q.text, tuple(sorted(q.choices))) if q.kind in ordered else normalised(q) for q in asked)
        parts.setdefault(part, set()).update(contents)
    assert not parts["train"] & parts["test"]


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        ("sum", "What do you get when you add the two numbers 7 and 30?", "add the two numbers 30 and 7?"),
        ("add, multiply", "Add 4 and 9 and", "Add 9 and 4 and"),
    ],
)
def test_commuted_operands_are_the_same_content(kind, one, other):
    keys = {}
    set_name = next(s for s, kinds in KINDS.items() if kind in kinds)
    rng = random.Random(1)
    for _ in range(200_000):
        key, text, _, _ = KINDS[set_name][kind](rng)
        for wanted in (one, other):
            if wanted in text and (kind == "sum" or "by 3" in text):
                keys[wanted] = key
        if len(keys) == 2:
            break
    assert keys[one] == keys[other]


def test_sums_have_one_key_in_every_set():
    """7 + 30 in a story, as plain numbers and as an ARC question is one content."""
    rng = random.Random(2)
    for generate in (miniature_questions.story_sum, miniature_questions.plain_sum, miniature_questions.sum_choice):
        assert json.loads(generate(rng)[0])[0] == "+"


def test_answers_are_right(drawn):
    """The answers, computed again from the text by other code."""

    def numbers(q):
        return [int(n) for n in re.findall(r"\d+", q.text)]

    solve = {
        "story sum": sum, "sum": sum,
        "story difference": lambda n: n[0] - n[1], "difference": lambda n: n[1] - n[0],
        "add, subtract": lambda n: n[0] + n[1] - n[2], "double, add": lambda n: 2 * n[0] + n[1],
        "larger sum": lambda n: max(n[0] + n[1], n[2] + n[3]), "add, multiply": lambda n: (n[0] + n[1]) * n[2],
        "remainder": lambda n: n[0] % n[1], "median": statistics.median,
        "multiply, add": lambda n: n[0] * n[1] + n[2], "difference of products": lambda n: n[0] * n[1] - n[2] * n[3],
    }  # fmt: skip
    checked = set()
    for asked in drawn.values():
        for q in asked:
            chosen = q.choices[LABELS.index(q.answer)] if q.choices else q.answer
            if q.kind in solve:
                assert int(q.answer) == solve[q.kind](numbers(q)), q
            elif q.kind in ("larger", "larger, add"):
                n = numbers(q)
                pick = max if "larger" in q.text else min
                assert int(q.answer) == pick(n[:2]) + sum(n[2:]), q
            elif q.kind == "count":
                asked_for, listed = re.search(r"times is (\w+) in the list (.*)\?", q.text).groups()
                assert int(q.answer) == listed.split().count(asked_for)
            elif q.kind == "largest":
                assert int(chosen) == max(map(int, q.choices))
            elif q.kind == "second largest":
                assert int(chosen) == sorted(map(int, q.choices))[2]
            elif q.kind == "smallest":
                assert int(chosen) == min(map(int, q.choices))
            elif q.kind == "category":
                assert chosen in CATEGORIES[q.text.removeprefix("Which word names ").rstrip("?")]
            elif q.kind == "closest":
                assert abs(int(chosen) - numbers(q)[0]) == min(abs(int(c) - numbers(q)[0]) for c in q.choices)
            elif q.kind == "sum choice":
                assert int(chosen) == sum(numbers(q))
                assert q.choices.count(chosen) == 1
            else:
                raise AssertionError(f"no check for {q.kind}")
            checked.add(q.kind)
    assert checked == {kind for kinds in KINDS.values() for kind in kinds}


def test_fewer_options_leave_the_answer_right():
    rng = random.Random(3)
    for asked in (questions(s, "train", 60, 0) for s in ("arc_easy", "arc_challenge")):
        for q in asked:
            less = fewer_options(rng, q)
            assert less.choices[LABELS.index(less.answer)] == q.choices[LABELS.index(q.answer)]
            assert set(less.choices) <= set(q.choices)
            assert (less == q) == (q.kind == "second largest")


def test_labels_are_balanced(drawn):
    for s in ("arc_easy", "arc_challenge"):
        answers = [q.answer for q in drawn[s, "train"]]
        for label in LABELS:
            assert 0.18 < answers.count(label) / len(answers) < 0.32


def test_prompts_are_those_of_the_search():
    for s in ("arc_easy", "arc_challenge", "dart-1", "dart-5"):
        ours = questions(s, "test", 5, seed=0)
        theirs = load_questions(s, "test", DATA, limit=5)
        for mine, other in zip(ours, theirs, strict=True):
            assert render_prompt(other) == mine.prompt
            assert grade(other, mine.response)


def test_a_smaller_number_is_a_prefix():
    assert questions("dart-4", "test", 30, 0) == questions("dart-4", "test", 60, 0)[:30]


def test_asking_for_more_contents_than_there_are_is_said(monkeypatch):
    tiny = {"tiny": lambda rng: (miniature_questions._key("tiny", rng.randrange(40)), "?", (), "1")}
    monkeypatch.setitem(KINDS, "dart-1", tiny)
    with pytest.raises(UserError, match="dart-1 has only"):
        questions("dart-1", "test", 50, 0)
