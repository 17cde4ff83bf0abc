"""Training and validation parts: sizes per set, disjoint, the same for every program, unlike the test questions."""

import json

import pytest

from drllm.errors import UserError
from drllm.group_paths.parts import Parts


def write_questions(folder, train, test):
    """ARC-Easy files whose questions have the given texts."""
    for split, texts in (("train", train), ("test", test)):
        rows = [
            {
                "id": f"{split}-{number}",
                "question": text,
                "choices": {"text": ["yes", "no"], "label": ["A", "B"]},
                "answerKey": "A",
            }
            for number, text in enumerate(texts)
        ]
        (folder / f"arc_easy_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_parts_are_disjoint_seeded_and_unlike_the_test_questions(tmp_path):
    texts = [f"Is number {number} a number that people like to count with?" for number in range(9)]
    texts = [text.replace("number", word, 1) for text, word in zip(texts, "abcdefghi", strict=True)]
    repeated = "Which gas do plants take in from the air around them?"
    write_questions(tmp_path, [*texts, repeated], [repeated.upper()])
    parts = Parts.of(["arc_easy"], "arc_easy=4", "3")
    train, validation = parts.split(tmp_path, "arc_easy")["arc_easy"]
    chosen = [question.text for question in (*train, *validation)]
    assert (len(train), len(validation), len(set(chosen))) == (4, 3, 7)
    assert repeated not in chosen
    assert parts.split(tmp_path, "arc_easy")["arc_easy"] == (train, validation)
    assert parts.split(tmp_path, "arc_easy", seed=1)["arc_easy"] != (train, validation)
    everything = Parts.of(["arc_easy"]).split(tmp_path)["arc_easy"]
    assert [len(part) for part in everything] == [10, 0]


def test_sizes_per_set():
    sets = ("arc_easy", "arc_challenge", "piqa")
    assert Parts.of(sets, "arc=5,piqa=7").train == {"arc_easy": 5, "arc_challenge": 5, "piqa": 7}
    assert Parts.of(sets, "arc_easy=5").train == {"arc_easy": 5, "arc_challenge": 800, "piqa": 800}
    assert Parts.of(sets, "3", "arc=2").validation == {"arc_easy": 2, "arc_challenge": 2, "piqa": 0}


@pytest.mark.parametrize("wrong", ["0", "-1", "some", "arc_easy=0", "dart-1=5", "arc_easy"])
def test_wrong_sizes(wrong):
    with pytest.raises(UserError, match="--train_questions"):
        Parts.of(("arc_easy",), wrong)
    with pytest.raises(UserError, match=r"--(train|validation)_questions"):
        Parts.of(("arc_easy",), "5", wrong if wrong != "0" else "-0")
