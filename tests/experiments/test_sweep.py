import json
import shutil
from types import SimpleNamespace

import pytest

from drllm.paper.experiment_figures import draw_sweep
from drllm.questions.prompts import Prompt
from drllm.questions.sets import load_questions
from experiments import sweep
from tests.eval_toys import make_base, make_routed, routed_lm
from tests.search_toys import make_data

BLOCKS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, stock_model):
    base = make_base(tmp_path_factory.mktemp("base"), stock_model)
    return make_routed(base, tmp_path_factory.mktemp("routed"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), count=4)


@pytest.fixture
def run():
    def run(*arguments) -> int:
        return sweep.main(["--device", "cpu", *map(str, arguments)])

    return run


def test_sweep_from_skip_to_the_base_model(checkpoint, data, tmp_path, run, capsys):
    output = tmp_path / "deep" / "sweep.json"
    arguments = ["--data_dir", data, "--dataset", "arc_easy,dart-1", "--output", output, "--knobs=-0.8,-0.5,0.5"]
    assert run(checkpoint, *arguments, "--dtype", "float32", "--batch_size", 8) == 0
    result = json.loads(output.read_text())
    assert result["questions"] == 8
    assert result["command"].startswith("python -m experiments.sweep ")
    assert {"seed", "versions", "commit", "seconds"} <= result.keys()
    skipping, routed, executing = result["points"]
    assert executing["blocks_per_pass"] == BLOCKS == result["base"]["blocks_per_pass"]
    assert executing["accuracy"] == result["base"]["accuracy"]
    assert executing["blocks_per_query"] == result["base"]["blocks_per_query"]
    assert skipping["blocks_per_pass"] < routed["blocks_per_pass"]
    histogram = result["probabilities"]
    for action in ("skip", "execute", "repeat"):
        assert sum(histogram[action]) == 8 * BLOCKS
    assert "keeps the base accuracy with the fewest layers" in capsys.readouterr().out
    path = draw_sweep(json.loads(output.read_text()), tmp_path / "sweep.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_the_response_format_is_that_of_the_labels(checkpoint, data, tmp_path, run, capsys):
    routed = shutil.copytree(checkpoint, tmp_path / "routed")
    recorded = {"max_new_tokens": {"dart-1": 3}, "inject_boxed": True, "strict_letters": False}
    (routed / "labels_manifest.json").write_text(json.dumps({"chat_template": False, "arguments": recorded}))
    passes = {}
    for name, folder in (("default", checkpoint), ("labels", routed)):
        output = tmp_path / f"{name}.json"
        options = ["--data_dir", data, "--dataset", "dart-1", "--output", output, "--knobs=-0.5", "--batch_size", 8]
        assert run(folder, *options) == 0
        result = json.loads(output.read_text())
        passes[name] = result["base"]["blocks_per_query"] / BLOCKS
        printed = capsys.readouterr().out
        assert ("responses: the default format" in printed) == (name == "default")
    assert result["response_format"] == recorded
    assert "responses: dart-1 at most 3 new tokens, math prompts end with \\boxed{" in printed
    assert passes["labels"] <= 3 < passes["default"] <= 15


def test_answers_do_not_depend_on_the_generation_config(checkpoint, data, monkeypatch):
    lm = routed_lm(checkpoint, 8)
    questions = load_questions("dart-1", "train", data) + load_questions("dart-2", "train", data)
    prompts = [Prompt.of(question, lm.tokenizer, False) for question in questions]
    generate, answers = lm.generate_until, []

    def watched(requests, disable_tqdm):
        answers.append(generate(requests, disable_tqdm))
        return answers[-1]

    monkeypatch.setattr(lm, "generate_until", watched)
    for penalty in (1.0, 1.5):
        lm.model.generation_config.repetition_penalty = penalty
        sweep.run_at(lm, prompts, -0.5)
    assert len(answers[0]) == 8
    assert answers[0] == answers[1]


def test_the_chosen_knob_keeps_base_accuracy_with_the_fewest_layers():
    base = {"routing_control": 0.5, "accuracy": 0.5, "blocks_per_query": 10}

    def point(knob, accuracy, blocks):
        return {"routing_control": knob, "accuracy": accuracy, "blocks_per_query": blocks}

    points = [point(-0.9, 0.1, 2), point(-0.5, 0.5, 8), point(-0.4, 0.6, 8), point(0.0, 0.7, 9)]
    assert sweep.choose(points, base)["routing_control"] == -0.4
    assert sweep.choose(points[:1], base) is base


def test_labelled_questions_are_left_out(data, monkeypatch):
    questions = load_questions("arc_easy", "train", data)
    labels = SimpleNamespace(labels=[SimpleNamespace(set="arc_easy", question_id=questions[0].id)])
    monkeypatch.setattr(sweep, "read_labels", lambda folder: labels)
    left = sweep.validation_questions(["arc_easy"], data, data, None)
    assert [question.id for question in left] == [question.id for question in questions[1:]]
    assert len(sweep.validation_questions(["arc_easy"], data, None, 2)) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--knobs=-0.5,zero"], "--knobs -0.5,zero: expected comma-separated numbers"),
        (["--knobs="], "--knobs : expected comma-separated numbers"),
        (["--knobs=-3"], "--knobs is -3.0; it must be between -1 and 1"),
        (["--knobs=nan"], "--knobs is nan; it must be between -1 and 1"),
        (["--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--dataset", "none_such"], "none_such"),
        (["--dtype", "int7"], "unknown dtype 'int7'"),
        (["--device", "nonsense"], "--device nonsense is not a device of this machine"),
        (["--device", "cuda:99"], "--device cuda:99 is not a device of this machine"),
    ],
)
def test_bad_arguments_end_before_the_model_is_loaded(arguments, sentence, data, tmp_path, run, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "RoutedLM", lambda *given, **named: pytest.fail("the model was loaded"))
    assert run("checkpoint", "--data_dir", data, "--output", tmp_path / "x.json", *arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file/x.json", "."])
def test_an_output_that_cannot_be_written_ends_before_the_model_is_loaded(place, tmp_path, run, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "RoutedLM", lambda *given, **named: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    assert run("checkpoint", "--output", tmp_path / place) == 2
    assert "error: --output" in capsys.readouterr().err
