"""Labels that groups of questions share: they train, a stopped run resumes, processes share the work."""

import json
import os
import subprocess
import sys

import pytest

import data_generation
import train
from drllm.errors import UserError
from drllm.labels import read_labels
from drllm.miniature import MINIATURE_DATA, ROOT
from drllm.rollouts.likelihood import LikelihoodEngine
from drllm.rollouts.scores import ScoreStore
from extensions.groups import search as group_search
from extensions.groups.search import main

SMALL = f"--data_dir {MINIATURE_DATA} --dataset arc_easy,dart-5 --limit 12 --groups 3 --num_simulations 6".split()


def rows_of(folder):
    return [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]


def test_labels_of_groups_are_labels_that_train(tmp_path, capsys):
    folder = tmp_path / "labels"
    assert main([*SMALL, "--output_dir", str(folder)]) == 0
    assert "24 labels: " in capsys.readouterr().out
    labels = read_labels(folder)
    groups = labels.manifest.results["groups"]
    assert sum(sum(group["questions"].values()) for group in groups) == len(labels.labels) == 24
    paths = {"".join(map(str, label.path)) for label in labels.labels}
    assert paths == {group["path"] for group in groups}
    assert "1" * 10 in paths, "a group that nothing helps keeps the default path, and its questions stay"
    assert len(paths) > 1
    assert {label.kind for label in labels.labels} == {"group"}
    assert all(label.path_correct == label.base_correct for label in labels.labels if 0 not in label.path)
    arguments = ["--data", str(folder), "--num_epochs", "1", "--output_dir", str(tmp_path), "--run_name", "routed"]
    assert train.main(arguments) == 0
    record = json.loads((tmp_path / "routed" / "training.json").read_text())
    assert record["train_examples"] + record["held_out_examples"] == 24


def test_a_stopped_run_asks_nothing_twice_and_ends_with_the_same_labels(tmp_path, monkeypatch):
    assert main([*SMALL, "--output_dir", str(tmp_path / "whole")]) == 0
    add, left = ScoreStore.add, [5]

    def add_and_stop(store, rows):
        add(store, rows)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    command = [*SMALL, "--output_dir", str(tmp_path / "stopped")]
    with monkeypatch.context() as patch:
        patch.setattr(ScoreStore, "add", add_and_stop)
        assert main(command) == 130
    kept = tmp_path / "stopped-measured" / "00000.jsonl"
    before = kept.read_bytes()
    kept.write_bytes(before + b'["cut off')
    with pytest.raises(UserError, match=r"unfinished run; run the same extensions\.groups\.search command again"):
        read_labels(tmp_path / "stopped")
    assert main(command) == 0
    assert (tmp_path / "stopped" / "labels.jsonl").read_bytes() == (tmp_path / "whole" / "labels.jsonl").read_bytes()
    assert kept.read_bytes().startswith(before)
    asked = [tuple(json.loads(line)[:2]) for line in kept.read_text().splitlines()]
    assert len(asked) == len(set(asked))
    monkeypatch.setattr(ScoreStore, "add", lambda store, rows: pytest.fail("a finished run asked again"))
    assert main([*command[:-1], str(tmp_path / "other"), "--measured_dir", str(kept.parent), "--price", "0.5"]) == 0
    assert rows_of(tmp_path / "other") != rows_of(tmp_path / "stopped"), "at another price"


def test_a_folder_of_other_labels_is_refused(tmp_path, capsys):
    (tmp_path / "labels").mkdir()
    assert main([*SMALL, "--output_dir", str(tmp_path / "labels")]) == 0
    assert main([*SMALL, "--output_dir", str(tmp_path / "labels")]) == 0, "a finished run may be repeated"
    assert main([*SMALL, "--caution", "0.5", "--output_dir", str(tmp_path / "labels")]) == 2
    assert "arguments.caution was 1.0 and is now 0.5; repeat that run's arguments" in capsys.readouterr().err


def test_the_reward_may_be_the_probability_of_the_right_option(tmp_path, monkeypatch):
    def respond(engine, requests):
        assert requests == [], "labels are written from the scores that were measured"
        return []

    monkeypatch.setattr(LikelihoodEngine, "respond", respond)
    command = f"--data_dir {MINIATURE_DATA} --dataset arc_easy --reward likelihood --limit 8 --groups 2".split()
    assert main([*command, "--num_simulations", "3", "--output_dir", str(tmp_path / "labels")]) == 0
    labels = read_labels(tmp_path / "labels")
    assert len(labels.labels) == 8
    assert labels.manifest.reward == "likelihood"
    for label in labels.labels:
        assert label.path_correct == (label.path_response == label.answer)
        assert label.base_correct == (label.base_response == label.answer)
    scores = [json.loads(line)[2] for line in (tmp_path / "labels-measured" / "00000.jsonl").read_text().splitlines()]
    assert {len(of_options) for of_options in scores} == {4}


def test_bad_arguments_end_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(group_search, "load_model", lambda *given: pytest.fail("the model was loaded"))
    assert main(["--price", "nan", "--output_dir", str(tmp_path / "out")]) == 2
    assert "--price is nan; it must be a number" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_make_the_same_labels(tmp_path):
    program = ["-m", "extensions.groups.search", *SMALL, "--num_simulations", "20", "--output_dir"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29633"]
    for name, launcher in (("alone", [sys.executable]), ("two", torchrun)):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, *program, tmp_path / name], cwd=ROOT, env=environment, check=True)
    assert rows_of(tmp_path / "alone") == rows_of(tmp_path / "two")
    assert len(list((tmp_path / "two-measured").glob("0000[01].jsonl"))) == 2


def test_collections_are_groups_and_sets_have_numbers_of_their_own(tmp_path):
    command = f"--data_dir {MINIATURE_DATA} --dataset arc,dart-5 --limit arc_easy=4,arc_challenge=3,dart-5=5"
    command += f" --groups collection --num_simulations 2 --output_dir {tmp_path / 'labels'}"
    assert main(command.split()) == 0
    groups = read_labels(tmp_path / "labels").manifest.results["groups"]
    assert [group["questions"] for group in groups] == [{"arc_easy": 4, "arc_challenge": 3}, {"dart-5": 5}]


def test_prompts_and_graders_may_be_those_of_other_labels(tmp_path):
    data = ["--data_dir", str(MINIATURE_DATA), "--dataset", "dart-1", "--num_simulations", "2"]
    base_model = ["--inject_boxed", "--max_new_tokens", "dart=9", "--samples", "2", "--limit", "30"]
    assert data_generation.main([*data, *base_model, "--output_dir", str(tmp_path / "published")]) == 0
    grouped = ["--limit", "4", "--groups", "1", "--prompts_of", str(tmp_path / "published")]
    assert main([*data, *grouped, "--output_dir", str(tmp_path / "groups")]) == 0
    published, groups = (read_labels(tmp_path / name) for name in ("published", "groups"))
    assert groups.manifest.response_format == published.manifest.response_format
    assert groups.manifest.response_format.inject_boxed
    assert all(label.prompt.endswith("\\boxed{") for label in groups.labels)


@pytest.mark.parametrize("groups", ["0", "few", "-1"])
def test_groups_are_a_number_or_the_collections(groups, tmp_path, capsys):
    assert main([f"--groups={groups}", "--output_dir", str(tmp_path / "out")]) == 2
    assert f"--groups {groups}: expected a number from 1 on" in capsys.readouterr().err
