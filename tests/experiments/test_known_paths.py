"""The known paths of the positive control: their questions, labels beside them, and their gain."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from drllm.errors import UserError
from drllm.evaluation.outcomes import Outcome
from drllm.miniature import MINIATURE_DATA, ROOT
from drllm.questions.sets import load_questions
from experiments.known_paths import KnownPaths, agreement, label_quality, most_frequent, of_other_questions
from miniature.measurement import correct
from miniature.questions import SETS, questions
from miniature.training_paths import read_known_paths

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


def test_paths_of_another_length_are_refused():
    with pytest.raises(UserError, match="paths of 14 blocks, but the model has 10"):
        KnownPaths(CONTROL / "paths.json", MINIATURE_DATA, 10)


def test_a_damaged_file_is_refused(tmp_path):
    file = tmp_path / "paths.json"
    file.write_text(json.dumps({"sum": "1"}))
    with pytest.raises(UserError, match=r"--known_paths: .*missing kinds"):
        KnownPaths(file, MINIATURE_DATA, NUM_BLOCKS)


def test_agreement_counts_paths_blocks_and_skips():
    counts = agreement([(0, 1, 1), (0, 0, 1)], [(0, 1, 1), (0, 1, 0)])
    assert counts == {"questions": 2, "equal": 0.5, "blocks": 4 / 6, "skips_found": 2 / 3, "skips_right": 2 / 3}


def test_a_label_is_judged_by_what_it_does_for_other_questions_of_its_kind():
    """Two kinds; along its own label every question is right, along another's where that is the known path."""
    known = [(0, 1, 1)] * 4 + [(1, 1, 0)] * 3
    labels = [(0, 1, 1), (0, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 0), (0, 0, 1)]
    kinds = ["sum"] * 4 + ["larger"] * 3
    assert most_frequent(labels, known) == known
    others = of_other_questions(labels, known)
    assert sorted(others[:4]) == sorted(labels[:4])
    assert sorted(others[4:]) == sorted(labels[4:])
    assert others[3] == (0, 1, 1), "never its own"

    def answer(paths):
        right = [float(path in (own, label)) for path, own, label in zip(paths, known, labels, strict=True)]
        return Outcome(right, [float(sum(path)) for path in paths])

    quality = label_quality(labels, kinds, known, answer)
    accuracies = {name: values["accuracy"] for name, values in quality["followed"].items()}
    assert accuracies.pop("label of another question of its kind") == pytest.approx(5 / 7)
    assert list(accuracies.values()) == [0, 1, 1, 1]
    assert quality["kinds"]["sum"]["skips_right"] == 0.75
    assert quality["agreement"]["questions"] == 7


def test_every_kind_has_a_path_of_its_own_and_fewer_layers_on_average():
    paths = read_known_paths(CONTROL / "paths.json")
    assert len(set(paths.values())) == len(paths)
    assert sum(map(sum, paths.values())) / len(paths) < 0.85 * NUM_BLOCKS


@pytest.mark.slow
def test_the_known_paths_beat_the_default_path_at_fewer_layers():
    """On the checked-in weights and test questions that their training never saw."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(CONTROL / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(CONTROL / "model")
    paths = read_known_paths(CONTROL / "paths.json")
    asked = [question for name in SETS for question in questions(name, "test", 400, seed=0)]
    own = torch.tensor([paths[question.kind] for question in asked])
    default, known = (correct(model, tokenizer, asked, chosen).double() for chosen in (None, own))
    gain = known - default
    assert own.sum(1).double().mean() < 0.85 * NUM_BLOCKS
    assert 100 * (gain.mean() - 1.96 * gain.std() / len(gain) ** 0.5) > 5
    others = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))]
    assert known.mean() - correct(model, tokenizer, asked, others).double().mean() > 0.01, "the paths fit their kinds"
