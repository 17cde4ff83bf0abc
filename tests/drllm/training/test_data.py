"""From label folders to examples."""

import itertools
import json
from dataclasses import replace

import pytest

from drllm.checkpoints import load_tokenizer
from drllm.errors import UserError
from drllm.labels import Example
from drllm.training.data import load_labels, make_examples, split_by_question


def test_optional_sets_are_left_out_unless_asked_for(tiny_base, labels_maker, tmp_path):
    data = str(labels_maker(tmp_path, tiny_base, 12, sets=("arc_easy", "squadv2", "commonsense")))
    said = []
    assert {label.set for label in load_labels([data], say=said.append).labels} == {"arc_easy"}
    assert said == [
        "labels: leaving out 4 rows of squadv2; --with_squad uses them",
        "labels: leaving out 4 rows of commonsense; --with_commonsense uses them",
    ]
    assert {label.set for label in load_labels([data], with_squad=True).labels} == {"arc_easy", "squadv2"}
    assert len(load_labels([data], True, True).labels) == 12


def test_an_optional_set_without_labels(tiny_labels):
    with pytest.raises(UserError, match=r"--with_squad was given, but .* has no rows of squadv2"):
        load_labels([str(tiny_labels)], with_squad=True)


def test_nothing_left_to_train_on(tiny_base, labels_maker, tmp_path):
    with pytest.raises(UserError, match="no labels to train on"):
        load_labels([str(labels_maker(tmp_path, tiny_base, 4, sets=("squadv2",)))])


def test_folders_are_merged_when_they_belong_together(tiny_base, labels_maker, tmp_path):
    folders = [str(labels_maker(tmp_path / name, tiny_base, 5, sets=(name,))) for name in ("arc_easy", "dart-1")]
    labels = load_labels(folders)
    assert len(labels.labels) == 10
    assert len(labels.manifests) == 2
    manifest = tmp_path / "dart-1" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"dtype": "bfloat16"}))
    with pytest.raises(UserError, match=r"dart-1 have dtype 'bfloat16', those in .*arc_easy 'float32'"):
        load_labels(folders)


def test_the_same_labels_twice_are_refused(tiny_labels):
    with pytest.raises(UserError, match="twice"):
        load_labels([str(tiny_labels), str(tiny_labels)])


def test_examples_of_best_and_of_all_paths(tiny_base, tiny_labels):
    labels, tokenizer = load_labels([str(tiny_labels)]), load_tokenizer(str(tiny_base))
    best = make_examples(labels, tokenizer)
    assert [e.path for e in best] == [label.path for label in labels.labels]
    assert [list(e.token_ids) for e in best] == [tokenizer(label.prompt)["input_ids"] for label in labels.labels]
    every = make_examples(labels, tokenizer, "all")
    assert len(every) == sum(len(set(label.good_paths)) for label in labels.labels) == 48


def test_special_tokens_are_added_unless_a_chat_template_brought_them(tiny_labels):
    """By the rule of lm-eval, so that evaluation sees the tokens of training."""

    class Recorder:
        bos_token = "<s>"

        def __call__(self, prompt, add_special_tokens):
            return {"input_ids": [1, 1] if add_special_tokens else [1]}

    labels = load_labels([str(tiny_labels)])
    for chat_template in (False, True):
        given = [
            replace(label, prompt=("<s>" if begins else "") + label.prompt)
            for label, begins in zip(labels.labels, itertools.cycle((True, False)))
        ]
        examples = make_examples(replace(labels, labels=given), Recorder(), chat_template=chat_template)
        assert [len(each.token_ids) for each in examples] == [1, 2] * (len(examples) // 2)


def examples_of(questions: int, paths: int = 3) -> list[Example]:
    return [Example(f"s/{q}", (1,), (p,)) for q in range(questions) for p in range(paths)]


def test_the_split_keeps_questions_together():
    examples = examples_of(40)
    train, held_out = split_by_question(examples, 0.1, seed=0)
    assert len(held_out) == 4 * 3
    assert sorted(train + held_out) == list(range(120))
    assert not {examples[i].question for i in train} & {examples[i].question for i in held_out}
    assert split_by_question(examples, 0.1, seed=0) == (train, held_out)
    assert split_by_question(examples, 0.1, seed=1) != (train, held_out)


def test_the_split_depends_on_questions_and_not_on_their_order():
    examples = examples_of(40)
    held_out = {examples[i].question for i in split_by_question(examples, 0.2, 0)[1]}
    backwards = examples[::-1]
    assert {backwards[i].question for i in split_by_question(backwards, 0.2, 0)[1]} == held_out


@pytest.mark.parametrize(("questions", "fraction", "held_out"), [(1, 0.1, 0), (2, 0.1, 1), (2, 0.99, 1), (10, 0.0, 0)])
def test_the_split_of_few_questions(questions, fraction, held_out):
    assert len(split_by_question(examples_of(questions, 1), fraction, 0)[1]) == held_out
