"""Checkpoints compared by log-likelihood: the same answers as lm-eval, paired, resumed."""

import json
import shutil
import statistics
import subprocess
import sys

import pytest
import torch

from drllm.evaluation.protocol import default_tasks
from drllm.group_paths.paths import describe_edits, path_of_edits
from drllm.miniature import ROOT
from drllm.questions.sets import load_questions
from drllm.rollouts.scores import ScoreStore
from experiments import compare_likelihood, group_paths
from tests import search_toys
from tests.eval_toys import evaluate, make_routed, make_tasks, metrics, routed_lm


@pytest.fixture(scope="module")
def toy(tmp_path_factory, stock_model):
    """(base, routed checkpoint, data with train and test questions)."""
    folder = tmp_path_factory.mktemp("compare_likelihood")

    base = search_toys.make_model(folder / "model", stock_model)
    data = search_toys.make_data(folder / "data", 16, seed=5)
    make_tasks(data, 12)
    return base, make_routed(base, folder / "routed"), data


LIKELIHOOD_TASK = """
task: toy_arc
dataset_path: json
dataset_kwargs: {{data_files: {file}}}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def test_accuracy_and_layers_are_those_of_lm_eval_and_a_second_run_scores_nothing(toy, tmp_path, monkeypatch):
    base, routed, data = toy
    groups = f"--reward likelihood --model {base} --data_dir {data} --dataset arc --train_questions 8 --groups 2"
    groups += " --pilot 4 --keep 3 --candidates 2 --most_skips 1 --batch_size 4"
    assert group_paths.main([*groups.split(), "--output_dir", str(tmp_path / "groups")]) == 0
    assert default_tasks(tmp_path / "groups") == "drllm_ll_arc_easy,drllm_ll_arc_challenge"  # of eval.sh
    (group,) = json.loads((tmp_path / "groups/labels_manifest.json").read_text())["groups"][:1]
    assert group["chain"][0]["edits"] == ""
    assert group["chain"][0]["layers"] == 6
    assert 0 < group["chain"][0]["reward"] < 1
    assert group["questions"] == {"arc_easy": 8}
    arguments = f"--model {base} --checkpoint paper={routed} --data_dir {data} --sets arc_easy --batch_size 4"
    arguments += f" --train_sets arc --train_scores {tmp_path}/groups-measured --train_questions 8 --most_edits 1"
    arguments += f" --work_dir {tmp_path}/work --output {tmp_path}/result.json"
    arguments = [*arguments.split(), "--static_paths", "skip 1; skip 1, repeat 4"]
    assert compare_likelihood.main(arguments) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    (data / "toy_arc.yaml").write_text(LIKELIHOOD_TASK.format(file=data / "arc_easy_test.jsonl"))
    judged = evaluate(routed_lm(routed, batch_size=4), data, ["toy_arc"])
    assert result["sets"]["paper"]["arc_easy"]["accuracy"] == pytest.approx(metrics(judged)["toy_arc"]["acc,none"])
    counted = judged["config"]["block_applications"]["toy_arc"]
    assert result["sets"]["paper"]["arc_easy"]["layers"] == pytest.approx(
        sum(
            sum(share * times for times, share in enumerate(shares))
            for shares in zip(*counted["share_per_block"].values(), strict=True)
        )
    )
    assert result["sets"]["base"]["arc_easy"]["layers"] == 6
    names = [row["method"].split(":")[0] for row in result["rows"]]
    assert names == ["base", "paper", "random", "static", "static", "static", "influence", "early exit"]
    rows = {row["method"]: row for row in result["rows"]}
    assert [rows[f"static: {edits}"]["layers"] for edits in ("skip 1", "skip 1, repeat 4")] == [5, 6]
    assert rows["base"]["probability"]["points"] == 0
    skipped = rows["static: skip 1"]["probability"]
    assert skipped["low"] < skipped["points"] < skipped["high"]
    store = ScoreStore(tmp_path / "work" / "test", json.loads((tmp_path / "work/test/scores.json").read_text()), None)
    gold = {
        question.id: question.labels.index(question.answer) for question in load_questions("arc_easy", "test", data)
    }

    def probability(path):
        return [
            torch.tensor(scores[path]).double().softmax(0)[gold[name]].item()
            for name, scores in store.by_question().items()
        ]

    gains = zip(probability((1, 0, 1, 1, 1, 1)), probability((1,) * 6), strict=True)
    assert skipped["points"] == pytest.approx(100 * statistics.mean(a - b for a, b in gains), abs=1e-3)
    assert "| paper |" in (tmp_path / "result.md").read_text()
    assert (tmp_path / "result.png").stat().st_size > 1000

    monkeypatch.setattr(
        compare_likelihood.LikelihoodRewards, "score", lambda self, work, title: self._scores.update()
    )  # nothing is scored: all scores must be in the stores
    assert compare_likelihood.main(arguments) == 0
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == result["rows"]


def test_group_paths_by_set_need_no_routers(toy, tmp_path, capsys):
    base, routed, data = toy
    chain = [{"edits": "", "layers": 6, "reward": 0.5}, {"edits": "skip 2, skip 4", "layers": 4, "reward": 0.5}]
    manifest = {"groups": [{"questions": {"arc_easy": 8}, "chain": chain}], "arguments": {"price": "0.01"}}
    shutil.copytree(routed, tmp_path / "groups")
    (tmp_path / "groups" / "labels_manifest.json").write_text(json.dumps(manifest))
    arguments = f"--model {base} --checkpoint groups={tmp_path}/groups --data_dir {data} --batch_size 4 --by_set only"
    arguments += f" --controls= --work_dir {tmp_path}/work --output {tmp_path}/result.json --sets"
    assert compare_likelihood.main([*arguments.split(), "arc_easy"]) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "result.json").read_text())["rows"]}
    assert rows.keys() == {"base", "groups, by set"}
    assert rows["groups, by set"]["layers"] == 4
    path = path_of_edits("skip 2, repeat 4", 6)
    assert path == (1, 1, 0, 1, 2, 1)
    assert describe_edits(path) == "skip 2, repeat 4"
    assert compare_likelihood.main([*arguments.split(), "arc"]) == 2
    assert "has no path of the set arc_challenge" in capsys.readouterr().err
    # other checkpoints beside it have no paths of sets
    assert compare_likelihood.main([*arguments.split(), "arc_easy", "--checkpoint", f"paper={routed}"]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"base", "groups, by set"}
    alone = arguments.replace(f"groups={tmp_path}/groups", f"paper={routed}")
    assert compare_likelihood.main([*alone.split(), "arc_easy"]) == 2
    assert "--by_set: no checkpoint has group paths; pass one of experiments.group_paths" in capsys.readouterr().err


def test_listed_training_questions_and_the_differences_of_a_mix(toy, tmp_path, capsys):
    base, routed, data = toy
    shutil.copytree(routed, tmp_path / "again")
    training = {name: [one.id for one in load_questions(name, "train", data)] for name in ("arc_easy", "arc_challenge")}
    listed = {"arc_easy": training["arc_easy"][::2], "arc_challenge": training["arc_challenge"][:5]}
    (tmp_path / "listed.json").write_text(json.dumps(listed))
    arguments = f"--model {base} --checkpoint paper={routed} --checkpoint again={tmp_path}/again --data_dir {data}"
    arguments += f" --sets arc --batch_size 4 --random_seeds 0 --controls= --questions {tmp_path}/listed.json"
    arguments += f" --work_dir {tmp_path}/work --output {tmp_path}/result.json --weights arc_easy=3,arc_challenge=1"
    arguments = [*arguments.split(), "--static_paths", "skip 1"]
    assert compare_likelihood.main(arguments) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    store = ScoreStore(tmp_path / "work" / "test", json.loads((tmp_path / "work/test/scores.json").read_text()), None)
    assert store.by_question().keys() == {*listed["arc_easy"], *listed["arc_challenge"]}
    pairs = result["differences"]
    against_base = {"paper - base", "again - base", "static: skip 1 - base"}
    assert pairs.keys() == against_base | {"paper - again", "paper - static: skip 1", "again - static: skip 1"}
    assert pairs["paper - again"]["mix"] == {"points": 0, "low": 0, "high": 0}
    skipped = pairs["static: skip 1 - base"]
    assert skipped["all"] == next(row["against_base"] for row in result["rows"] if row["method"] == "static: skip 1")
    easy, hard, mix = (skipped[name] for name in ("arc_easy", "arc_challenge", "mix"))
    assert mix["points"] == pytest.approx(0.75 * easy["points"] + 0.25 * hard["points"])
    half = [0.75 * (easy["high"] - easy["points"]), 0.25 * (hard["high"] - hard["points"])]
    assert mix["high"] - mix["points"] == pytest.approx((half[0] ** 2 + half[1] ** 2) ** 0.5)
    gold = {one.id: one.labels.index(one.answer) for name in listed for one in load_questions(name, "train", data)}

    def right(name, path):
        scores = store.by_question()[name][path]
        return scores.index(max(scores)) == gold[name]

    gains = [right(name, (1, 0, 1, 1, 1, 1)) - right(name, (1,) * 6) for name in listed["arc_easy"]]
    assert easy["points"] == pytest.approx(100 * statistics.mean(gains))
    assert "| static: skip 1 - base |" in (tmp_path / "result.md").read_text()
    for damaged, sentence in (
        ({"arc_easy": ["nobody"], "arc_challenge": listed["arc_challenge"]}, "arc_easy has no question 'nobody'"),
        ({"arc_easy": listed["arc_easy"]}, "no list of ids of arc_challenge"),
        ({"arc_easy": [], "arc_challenge": [7]}, "no list of ids of arc_easy"),
    ):
        (tmp_path / "listed.json").write_text(json.dumps(damaged))
        assert compare_likelihood.main(arguments) == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_report_the_same_as_one(toy, tmp_path):
    base, routed, data = toy
    command = f"-m experiments.compare_likelihood --model {base} --checkpoint paper={routed} --data_dir {data}"
    command += " --sets arc_easy --controls influence --most_edits 1 --test_questions 7 --batch_size 2"
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2"
    results = []
    for name, launch in (("one", ""), ("two", torchrun)):
        output = f"--work_dir {tmp_path}/{name} --output {tmp_path}/{name}.json"
        subprocess.run([sys.executable, *f"{launch} {command} {output}".split()], cwd=ROOT, check=True)
        results.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert results[0]["rows"] == results[1]["rows"]


def test_bad_input_is_one_sentence(toy, tmp_path, capsys):
    base, _, data = toy
    common = f"--model {base} --data_dir {data} --sets arc_easy --output {tmp_path}/r.json --work_dir {tmp_path}/w"
    for extra, sentence in (
        ("--checkpoint nameless", "--checkpoint nameless: expected NAME=FOLDER"),
        (f"--checkpoint x={base}", "without routers"),
        ("--batch_size 0", "--batch_size is 0"),
        ("--static_paths=skip1", "--static_paths: 'skip1' is not a list of edits"),
        ("--static_paths=repeat\t77", "--static_paths: the model has only 6 blocks"),
        ("--controls static,luck", "'luck' is not a control; choose from static, influence, early exit"),
    ):
        arguments = [part.replace("\t", " ") for part in (*common.split(), *extra.split(" "))]
        assert compare_likelihood.main(arguments) == 2
        assert sentence in capsys.readouterr().err
