"""The list of questions that nobody has looked at."""

import gzip
import json

import pytest

from drllm.questions.overlap import load_training_questions
from drllm.questions.sets import Question
from drllm.search.selection import seeded_order
from experiments import fresh_questions
from tests import search_toys


def question(name: str, text: str) -> Question:
    return Question("arc_easy", name, text, ("x", "y"), ("A", "B"), "A")


def test_seen_questions_and_those_that_repeat_them_are_left_out():
    order = [
        question("scored", "which planet is the largest of all"),
        question("repeats_scored", "which planet is the largest of all planets"),
        question("repeats_test", "why does the moon have phases"),
        question("used", "what do bees make from the nectar of flowers"),
        question("repeats_used", "what do bees make from the nectar of the flowers"),
        question("fresh", "how long does light take to reach us"),
        question("fresh_too", "who found the first fossils in this valley"),
    ]
    tests = [question("test", "why does the moon have phases")]
    # The first question that is unlike the tests is "scored", the third one "used".
    found = fresh_questions.fresh_questions({"arc_easy": order}, {"arc_easy": 3}, {"scored"}, tests, None)
    chosen, unseen, left = found["arc_easy"]
    assert [one.id for one in chosen] == ["repeats_used", "fresh", "fresh_too"][1:]
    assert (unseen, left) == (3, 2)
    chosen, *_ = fresh_questions.fresh_questions({"arc_easy": order}, {"arc_easy": 3}, {"scored"}, tests, 1)["arc_easy"]
    assert [one.id for one in chosen] == ["fresh"]


def test_scores_labels_lists_and_used_questions_count_as_seen(tmp_path, capsys):
    data = search_toys.make_data(tmp_path / "data", 16, seed=5)
    order = seeded_order(load_training_questions(["arc_easy"], data)["arc_easy"], 0)
    ids = [one.id for one in order]
    (tmp_path / "results" / "deep").mkdir(parents=True)
    with gzip.open(tmp_path / "results/deep/train_scores.jsonl.gz", "wt") as file:
        file.write(json.dumps([ids[2], "111111", [-1.0, -2.0]]) + "\n")
    (tmp_path / "results/labels.jsonl").write_text(json.dumps({"question_id": ids[3]}) + "\n")
    (tmp_path / "list.json").write_text(json.dumps({"arc_easy": [ids[4]]}))
    arguments = (
        f"--data_dir {data} --dataset arc_easy --results {tmp_path}/results --lists {tmp_path}/list.json --used 2"
    )
    arguments += f" --output {tmp_path}/questions.json"
    assert fresh_questions.main(arguments.split()) == 0
    listed = json.loads((tmp_path / "questions.json").read_text())["arc_easy"]
    assert listed
    assert not set(ids[:5]) & set(listed)
    assert listed == [one for one in ids if one in listed]
    assert f"arc_easy: {len(ids) - 5} unseen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "sentence"),
    [("[]", "scores.jsonl:1: neither a score nor a label"), (None, "holds no scores or labels")],
)
def test_damaged_results_are_one_sentence(tmp_path, capsys, line, sentence):
    data = search_toys.make_data(tmp_path / "data", 8, seed=5)
    (tmp_path / "results").mkdir()
    if line is not None:
        (tmp_path / "results" / "scores.jsonl").write_text(line + "\n")
    arguments = f"--data_dir {data} --dataset arc_easy --results {tmp_path}/results --output {tmp_path}/q.json"
    assert fresh_questions.main(arguments.split()) == 2
    assert sentence in capsys.readouterr().err
