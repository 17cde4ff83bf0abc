"""The known paths of the positive control: each question has that of its kind."""

import json

import pytest

from drllm.errors import UserError
from drllm.miniature import MINIATURE_DATA, ROOT
from drllm.questions.sets import load_questions
from extensions.baselines.known_paths import KnownPaths
from miniature.questions import questions

CONTROL = ROOT / "miniature" / "positive_control"
NUM_BLOCKS = 14


@pytest.fixture
def known():
    return KnownPaths(CONTROL / "paths.json", MINIATURE_DATA, NUM_BLOCKS)


@pytest.mark.parametrize("set_name", ["arc_easy", "arc_challenge", "dart-3"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_kind_is_that_of_the_question_file(known, set_name, split):
    generated = {(q.text, q.choices): q.kind for q in questions(set_name, split, 40, seed=0)}
    for question in load_questions(set_name, split, MINIATURE_DATA, 40):
        assert known.kind_of(question, split) == generated[question.text, question.choices]


def test_a_question_that_the_files_do_not_name_is_refused(known):
    question = load_questions("dart-1", "test", MINIATURE_DATA, 1)[0]
    with pytest.raises(UserError, match="no kind for the question"):
        known.kind_of(question, "train")


@pytest.mark.parametrize("path", ["1111", "1" * 13 + "3", 7, None])
def test_a_path_that_is_none_is_refused(tmp_path, path):
    (tmp_path / "paths.json").write_text(json.dumps({"sum": path}))
    with pytest.raises(UserError, match=r"--known_paths .* the path of 'sum' is .*, expected 14 digits"):
        KnownPaths(tmp_path / "paths.json", MINIATURE_DATA, NUM_BLOCKS)
