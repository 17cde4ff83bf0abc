"""The comparison of methods, by every kind of reward: the same answers as lm-eval, paired, resumed, refused in time."""

import json
import subprocess
import sys

import pytest

from drllm.miniature import MINIATURE_DATA, ROOT
from drllm.questions.grading import extract_label
from drllm.questions.prompts import Prompt
from drllm.questions.sets import load_questions
from drllm.rollouts.engine import Request, RolloutEngine
from drllm.rollouts.likelihood import LikelihoodEngine
from extensions.baselines import compare
from tests import search_toys
from tests.eval_toys import evaluate, make_routed, make_tasks, metrics, routed_lm

EVERY = "static,shortgpt,layerskip,mindskip,flexidepth,knob,random,ceiling"


@pytest.fixture(scope="module")
def toy(tmp_path_factory, stock_model):
    """(base, routed checkpoint, data with train and test questions)."""
    folder = tmp_path_factory.mktemp("compare")
    base = search_toys.make_model(folder / "model", stock_model)
    data = search_toys.make_data(folder / "data", 16, seed=5)
    make_tasks(data, 12)
    return base, make_routed(base, folder / "routed"), data


def run(toy, folder, more, checkpoint=True):
    base, routed, data = toy
    arguments = f"--model {base} --data_dir {data} --dataset arc_easy --batch_size 4 --train_questions 8"
    arguments += f" --work_dir {folder}/work --output {folder}/result.json {more}"
    named = ["--checkpoint", f"as published={routed}"] if checkpoint else []
    return compare.main([*arguments.split(), *named])


@pytest.mark.parametrize("reward", ["likelihood", "generation"])
def test_every_method_has_a_row_and_a_second_run_answers_nothing(toy, tmp_path, monkeypatch, reward):
    monkeypatch.setattr(compare, "CEILING_QUESTIONS", 2)
    more = f"--reward {reward} --skips 2 --seeds 2 --weights arc_easy=7 --methods {EVERY}"
    assert run(toy, tmp_path, more) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    rows = {row["method"].split(", knob")[0].split(":")[0]: row for row in result["rows"]}
    assert rows["base"]["layers"] == pytest.approx(6)
    assert rows["base"]["default_share"] == 1
    for name in ("static", "ShortGPT", "LayerSkip early exit", "random skips"):
        assert rows[name]["layers"] == pytest.approx(4)
    assert [rows[name]["seeds"] for name in ("MindSkip", "FlexiDepth", "ShortGPT")] == [2, 2, 1]
    assert rows["MindSkip"]["cost"]["parameters"] == 6 * 33
    assert {"as published", "random decisions, at the rates of as published"} < set(rows)
    assert rows["CoLa ceiling (uses the test answer)"]["questions"] == 2
    assert rows["ShortGPT"]["against_static"]["points"] == pytest.approx(
        100 * (rows["ShortGPT"]["accuracy"] - rows["static"]["accuracy"])
    ), "the last static path has as many layers"
    assert "against_static" not in rows["CoLa ceiling (uses the test answer)"], "on other questions"
    differences = result["differences"]["as published - ShortGPT"]
    assert differences.keys() == {"arc_easy", "all", "mix"}
    assert differences["mix"] == pytest.approx(differences["all"])
    assert "| MindSkip " in (tmp_path / "result.md").read_text()
    assert (tmp_path / "result.png").stat().st_size > 1000

    def nothing(*_arguments, **_options):
        raise AssertionError("scored again")

    for engine in (LikelihoodEngine, RolloutEngine):
        monkeypatch.setattr(engine, "_run", nothing)
    assert run(toy, tmp_path, more) == 0
    again = json.loads((tmp_path / "result.json").read_text())["rows"]
    for row, before in zip(again, result["rows"], strict=True):
        assert row["accuracy"] == before["accuracy"], row["method"]
        assert row["layers"] == pytest.approx(before["layers"], abs=1e-4), row["method"]  # stored with five digits


def test_the_form_of_responses_is_told_from_what_they_know(toy, tmp_path):
    base, _, data = toy
    assert run(toy, tmp_path, "--methods=flexidepth --skips 0", checkpoint=False) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    model, tokenizer = search_toys.load(base)
    questions = load_questions("arc_easy", "test", data)
    prompts = [Prompt.of(question, tokenizer, chat=False) for question in questions]
    responses = [rollout.response for rollout in RolloutEngine(model, tokenizer, 4).respond([
        Request(prompt, (1,) * 6) for prompt in prompts
    ])]  # fmt: skip
    labels = [extract_label(text, question.labels) for text, question in zip(responses, questions, strict=True)]
    answered = sum(label is not None for label in labels)
    right = sum(label == question.answer for label, question in zip(labels, questions, strict=True))
    assert 0 < answered < len(labels)
    for row in (result["rows"][0], result["rows"][0]["sets"]["arc_easy"]):
        assert row["answered"] == pytest.approx(answered / len(labels))
        assert row["accuracy_of_answered"] == pytest.approx(right / answered)
    cell = f"{100 * answered / len(labels):.1f}% ({100 * right / answered:.2f}%)"
    assert cell in (tmp_path / "result.md").read_text()
    flexidepth, base_row = result["rows"][1], result["rows"][0]
    assert (flexidepth["answered"], flexidepth["layers"]) == (base_row["answered"], 6), (
        "with every block it is the base"
    )


def test_a_checkpoint_of_another_base_is_refused(toy, tmp_path, stock_model, capsys):
    def changed(*arguments):
        model = stock_model(*arguments)
        model.model.layers[0].mlp.up_proj.weight.data *= 2
        return model

    other = search_toys.make_model(tmp_path / "other", changed)
    assert run((other, *toy[1:]), tmp_path, "--reward likelihood --methods=") == 2
    assert "name the base that the checkpoint was trained on with --model" in capsys.readouterr().err


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


def test_accuracy_and_layers_are_those_of_lm_eval(toy, tmp_path):
    more = ["--static_paths", "skip 1; skip 1, repeat 4"]
    base, routed, data = toy
    arguments = f"--model {base} --data_dir {data} --dataset arc_easy --batch_size 4 --reward likelihood --methods="
    arguments += f" --work_dir {tmp_path}/work --output {tmp_path}/result.json --checkpoint paper={routed}"
    assert compare.main([*arguments.split(), *more]) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "result.json").read_text())["rows"]}
    (data / "toy_arc.yaml").write_text(LIKELIHOOD_TASK.format(file=data / "arc_easy_test.jsonl"))
    judged = evaluate(routed_lm(routed, batch_size=4), data, ["toy_arc"])
    assert rows["paper"]["accuracy"] == pytest.approx(metrics(judged)["toy_arc"]["acc,none"])
    counted = judged["config"]["block_applications"]["toy_arc"]
    assert rows["paper"]["layers"] == pytest.approx(
        sum(
            sum(share * times for times, share in enumerate(shares))
            for shares in zip(*counted["share_per_block"].values(), strict=True)
        )
    )
    assert [rows[f"static: {edits}"]["layers"] for edits in ("skip 1", "skip 1, repeat 4")] == [5, 6]
    gain = rows["static: skip 1"]["value_against_base"]
    assert gain["low"] < gain["points"] < gain["high"]


def test_questions_of_the_training_split_can_be_the_test(toy, tmp_path):
    ids = [question.id for question in load_questions("arc_easy", "train", toy[2])][3:6]
    (tmp_path / "ids.json").write_text(json.dumps({"arc_easy": ids}))
    assert run(toy, tmp_path, f"--methods=static --questions {tmp_path}/ids.json", checkpoint=False) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["test_questions"], result["training_questions"]) == (3, 8)
    (tmp_path / "ids.json").write_text(json.dumps({"arc_easy": ["none such"]}))
    assert run(toy, tmp_path, f"--methods= --questions {tmp_path}/ids.json", checkpoint=False) == 2


def test_known_paths_have_the_whole_gain(tmp_path):
    control = ROOT / "miniature" / "positive_control"
    arguments = f"--model {control / 'model'} --data_dir {MINIATURE_DATA} --dataset dart-1,dart-5 --test_questions 30"
    arguments += f" --known_paths {control / 'paths.json'} --methods random --train_questions 4 --batch_size 64"
    arguments += f" --work_dir {tmp_path}/work --output {tmp_path}/result.json"
    assert compare.main(arguments.split()) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "result.json").read_text())["rows"]}
    assert rows["known paths"]["layers"] < rows["base"]["layers"] == 14
    assert rows["known paths"]["recovered"]["share"] == 1
    assert rows["base"]["recovered"]["share"] == 0
    assert "share of the known gain" in (tmp_path / "result.md").read_text()


def test_questions_are_asked_as_the_labels_were_made(toy, tmp_path):
    base, routed, data = toy
    manifest = (
        json.loads((routed / "labels_manifest.json").read_text()) if (routed / "labels_manifest.json").exists() else {}
    )
    manifest |= {"model": str(base), "dtype": "float32", "chat_template": False, "data_dir": str(data)}
    manifest["arguments"] = {"dataset": ["arc_easy"], "max_new_tokens": {"arc_easy": 3}, "strict_letters": True}
    (routed / "labels_manifest.json").write_text(json.dumps(manifest))
    arguments = compare.parse_arguments(["--checkpoint", f"a={routed}", "--output", str(tmp_path / "r.json")])
    protocol = compare.Protocol.of(arguments, compare.PartialState(cpu=True))
    assert (protocol.model, protocol.sets, protocol.data_dir) == (str(base), ("arc_easy",), data)
    assert protocol.response_format.strict_letters
    assert protocol.response_format.limit("arc_easy", False) == 3


@pytest.mark.slow
def test_two_processes_report_the_same_as_one(toy, tmp_path):
    base, routed, data = toy
    command = f"-m extensions.baselines.compare --model {base} --checkpoint paper={routed} --data_dir {data}"
    command += " --dataset arc_easy --reward likelihood --methods static,shortgpt --test_questions 7 --batch_size 2"
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2"
    results = []
    for name, launch in (("one", ""), ("two", torchrun)):
        output = f"--work_dir {tmp_path}/{name} --output {tmp_path}/{name}.json"
        subprocess.run([sys.executable, *f"{launch} {command} {output}".split()], cwd=ROOT, check=True)
        results.append(json.loads((tmp_path / f"{name}.json").read_text()))
    for result in results:
        for row in result["rows"]:
            row["cost"] = None
    assert results[0]["rows"] == results[1]["rows"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--checkpoint nameless", "--checkpoint nameless: expected NAME=FOLDER"),
        ("--checkpoint x=BASE", "without routers"),
        ("--batch_size 0", "--batch_size is 0"),
        ("--test_questions 1", "--test_questions is 1; it must be at least 2"),
        ("--methods mindskip,luck", "'luck' is not a method; choose from static, shortgpt"),
        ("--skips 6", "--skips 6: the model has only 6 blocks"),
        ("--static_paths=skip1", "--static_paths: 'skip1' is not a list of edits"),
        ("--static_paths=repeat\t77", "--static_paths: the model has only 6 blocks"),
        ("--reward likelihood --dataset dart", "dart-1 is not multiple choice, so --reward likelihood cannot judge it"),
        ("--dataset none_such", "none_such"),
        ("--work_dir FILE", "--work_dir"),
    ],
)
def test_bad_input_is_one_sentence(toy, tmp_path, capsys, more, sentence):
    base, _, data = toy
    (tmp_path / "file").write_text("")
    common = f"--model {base} --data_dir {data} --dataset arc_easy --output {tmp_path}/r.json --work_dir {tmp_path}/w"
    more = more.replace("BASE", str(base)).replace("FILE", str(tmp_path / "file")).split(" ")
    assert compare.main([*common.split(), *(part.replace("\t", " ") for part in more)]) == 2
    assert sentence in capsys.readouterr().err
