"""The known paths of the positive control: each question has that of its kind."""

import json

import pytest

from drllm.errors import UserError
from drllm.miniature import MINIATURE_DATA, ROOT
from drllm.questions.sets import load_questions
from extensions.baselines.known_paths import known_paths
from miniature.questions import questions

CONTROL = ROOT / "miniature" / "positive_control"
NUM_BLOCKS = 14


@pytest.mark.parametrize("set_name", ["arc_easy", "arc_challenge", "dart-3"])
def test_the_path_is_that_of_the_kind_in_the_question_file(set_name):
    written = json.loads((CONTROL / "paths.json").read_text())
    expected = {(q.text, q.choices): written[q.kind] for q in questions(set_name, "test", 40, seed=0)}
    asked = load_questions(set_name, "test", MINIATURE_DATA, 40)
    paths = known_paths(CONTROL / "paths.json", MINIATURE_DATA, NUM_BLOCKS, asked)
    assert ["".join(map(str, path)) for path in paths] == [expected[q.text, q.choices] for q in asked]


def test_a_question_that_the_files_do_not_name_is_refused():
    asked = load_questions("dart-1", "train", MINIATURE_DATA, 1)
    with pytest.raises(UserError, match="no kind for the question"):
        known_paths(CONTROL / "paths.json", MINIATURE_DATA, NUM_BLOCKS, asked)


@pytest.mark.parametrize("path", ["1111", "1" * 13 + "3", 7, None])
def test_a_path_that_is_none_is_refused(tmp_path, path):
    (tmp_path / "paths.json").write_text(json.dumps({"sum": path}))
    with pytest.raises(UserError, match=r"--known_paths .* the path of 'sum' is .*, expected 14 digits"):
        known_paths(tmp_path / "paths.json", MINIATURE_DATA, NUM_BLOCKS, [])
