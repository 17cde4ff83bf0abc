"""Training questions that nearly repeat a test question are found, others are not."""

import json

import pytest

from drllm.errors import UserError
from drllm.questions.overlap import load_training_questions, near_duplicates
from drllm.questions.sets import Question


def question(number: int, text: str, name: str = "arc_easy") -> Question:
    return Question(name, f"{name}/{number}", text, ("x", "y"), ("A", "B"), "A")


TEST = "Which energy source is considered nonrenewable in most countries?"


@pytest.mark.parametrize(
    "text",
    [TEST, "which energy source  is considered NONRENEWABLE in most countries", "Say: " + TEST, TEST[:-11] + "places"],
)
def test_the_same_question_in_other_dress_is_found(text):
    others = [question(0, "What do plants need to grow?"), question(1, TEST, "openbookqa")]
    assert near_duplicates([question(2, text)], others) == {"arc_easy/2": "openbookqa/1"}


@pytest.mark.parametrize("text", ["Which energy source is renewable?", "Plants grow where?", "", "???"])
def test_another_question_is_kept(text):
    assert near_duplicates([question(2, text)], [question(1, TEST)]) == {}


def test_short_questions_are_compared_as_a_whole():
    assert near_duplicates([question(2, "Fossil fuels")], [question(1, "fossil fuels:")])
    assert not near_duplicates([question(2, "Fossil")], [question(1, "fossil fuels")])


def arc_row(number: int, text: str) -> str:
    choices = {"text": ["one", "two"], "label": ["A", "B"]}
    return json.dumps({"id": str(number), "question": text, "choices": choices, "answerKey": "A"}) + "\n"


def test_training_questions_leave_out_what_the_tests_ask(tmp_path):
    for name in ("arc_easy", "arc_challenge"):
        (tmp_path / f"{name}_train.jsonl").write_text(
            arc_row(1, f"Question one of {name}, which is long?") + arc_row(2, f"Only {name} asks what this asks.")
        )
        (tmp_path / f"{name}_test.jsonl").write_text(arc_row(1, "question one of arc easy which is long"))
    assert len(load_training_questions(["arc_easy"], tmp_path)["arc_easy"]) == 2
    kept = load_training_questions(["arc_easy", "arc_challenge"], tmp_path, unlike=["arc_challenge"])
    assert [q.text for q in kept["arc_easy"]] == ["Only arc_easy asks what this asks."]
    assert len(kept["arc_challenge"]) == 2


def test_a_set_without_any_other_question_is_an_error(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"arc_easy_{split}.jsonl").write_text(arc_row(1, TEST))
    with pytest.raises(UserError, match="every training question of arc_easy nearly repeats"):
        load_training_questions(["arc_easy"], tmp_path, unlike=["arc_easy"])
