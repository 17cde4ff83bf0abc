"""Effects of edits from stored scores: hand-made scores give known effects."""

import json
import math

import pytest

from drllm.questions.sets import load_questions
from drllm.rollouts.scores import ScoreStore
from drllm.search.selection import seeded_order
from experiments import edit_effects

DEFAULT, SKIPPED, REPEATED = (1, 1, 1), (1, 0, 1), (1, 1, 2)


@pytest.fixture
def data(tmp_path):
    choices = {"text": ["one", "two"], "label": ["A", "B"]}
    for name in ("arc_easy", "arc_challenge"):
        rows = [
            {"id": str(n), "question": f"Number {n} of {name}?", "choices": choices, "answerKey": "A"} for n in range(6)
        ]
        (tmp_path / f"{name}_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_effects_are_those_of_the_scores(data, tmp_path, capsys):
    store = ScoreStore(tmp_path / "scores", {"model_fingerprint": "x"})
    questions = seeded_order(load_questions("arc_easy", "train", data), 0)
    for number, question in enumerate(questions):
        store.add([(question.id, DEFAULT, (math.log(0.4), math.log(0.6)))])
        right = 0.7 if number < 2 else 0.5  # a tie is wrong
        store.add([(question.id, SKIPPED, (math.log(right), math.log(1 - right)))])
    store.add([(questions[0].id, REPEATED, (0.0, -1.0))])  # one question only: no row
    arguments = f"--scores {tmp_path}/scores --data_dir {data} --dataset arc_easy --train_questions 4"
    arguments += f" --validation_questions 2 --output {tmp_path}/effects.json"
    assert edit_effects.main(arguments.split()) == 0
    training, validation = json.loads((tmp_path / "effects.json").read_text())["rows"]
    assert (training["part"], training["edits"], training["layers"], training["questions"]) == (
        "training",
        "skip 1",
        2,
        4,
    )
    assert training["probability"] == pytest.approx((0.3 + 0.3 + 0.1 + 0.1) / 4, abs=1e-5)
    assert training["accuracy"] == pytest.approx(0.5)
    assert training["accuracy_error"] == pytest.approx(math.sqrt(1 / 3) / 2)
    assert (validation["part"], validation["accuracy"]) == ("validation", 0.0)
    assert "| arc_easy | training | 4 | skip 1 | 2 | +20.00 ± " in capsys.readouterr().out
    assert (tmp_path / "effects.md").read_text().startswith("| set |")


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("--dataset arc_challenge", "has no path scored along by 0.99 of a set; lower --share"),
        ("--share 2", "--share is 2.0; it must be between 0 and 1"),
        ("--scores nowhere", "--scores nowhere: no scores.json"),
    ],
)
def test_bad_input_is_one_sentence(data, tmp_path, capsys, extra, sentence):
    ScoreStore(tmp_path / "scores", {})
    arguments = f"--scores {tmp_path}/scores --data_dir {data} --dataset arc_easy --output {tmp_path}/e.json {extra}"
    assert edit_effects.main(arguments.split()) == 2
    assert sentence in capsys.readouterr().err
