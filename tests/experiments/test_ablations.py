"""Ablations: settings exist, runs resume, results are those of the checkpoints, test questions those of the labels."""

import dataclasses
import json
import shutil

import pytest

from drllm.checkpoints import join_routers, load_tokenizer
from drllm.errors import UserError
from drllm.labels import Label, LabelSet
from drllm.manifests import Manifest
from drllm.paper.ablation_report import draws_table, summarise
from drllm.questions.prompts import Prompt
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import load_questions
from drllm.rollouts.routed_paths import routed_paths
from drllm.training.trainer import RouterTrainingConfig
from experiments import ablations
from experiments.ablations import ABLATIONS, main, parse_arguments
from train_models import retrofit


@pytest.fixture
def questions(tmp_path):
    """A folder with eight test questions of ARC's schema."""
    folder = tmp_path / "questions"
    folder.mkdir()
    rows = [
        {
            "id": f"t{i}",
            "question": " ".join(f"w{(3 * i + k) % 60}" for k in range(i + 1)),
            "choices": {"text": ["w1", "w2"], "label": ["A", "B"]},
            "answerKey": "AB"[i % 2],
        }
        for i in range(8)
    ]
    (folder / "arc_easy_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def command(tiny_labels, questions, tmp_path):
    """`main` with arguments that suit the tiny model; returns its exit status."""

    def run(name: str, *arguments: str) -> int:
        folders = ["--data", str(tiny_labels), "--data_dir", str(questions), "--work_dir", str(tmp_path / "work")]
        training = ["--num_epochs", "1", "--warmup_steps", "1", "--test_sets", "arc_easy"]
        return main([name, *folders, *training, "--output", str(tmp_path / "results"), *arguments])

    return run


def test_every_setting_is_one_of_train():
    fields = {field.name for field in dataclasses.fields(RouterTrainingConfig)}
    for name, panels in ABLATIONS.items():
        for settings in panels.values():
            assert len({label for label, _ in settings}) == len(settings), name
            for _, changes in settings:
                assert changes.keys() <= fields
    # The published setting takes part in each, so that the others are compared with it.
    default = RouterTrainingConfig()
    for name, panels in ABLATIONS.items():
        for settings in panels.values():
            assert any(all(getattr(default, k) == v for k, v in changes.items()) for _, changes in settings), name


def test_an_ablation_from_labels_to_figure(command, tmp_path, capsys):
    assert command("bias_init", "--seeds", "0,1") == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "results" / "bias_init.json").read_text())
    assert (tmp_path / "results" / "bias_init.png").stat().st_size > 10_000
    assert (tmp_path / "results" / "bias_init_curves.png").stat().st_size > 10_000
    # The only set is one of ARC, so the group's numbers, of Table 6, are those of all questions.
    for run in result["runs"]:
        assert [run[f"{name}_arc"] for name in ("accuracy", "base_accuracy", "layers")] == [
            run[name] for name in ("accuracy", "base_accuracy", "layers")
        ]
        assert "accuracy_dart" not in run
        assert run["history"][-1]["macro_f1"] == run["macro_f1"]
    assert {"mean", "std"} == result["summary"][0]["accuracy_arc"].keys()
    assert result["labels"]["model"]
    assert [(run["setting"], run["seed"]) for run in result["runs"]] == [
        ("zero", 0),
        ("zero", 1),
        ("frequency", 0),
        ("frequency", 1),
    ]
    assert result["test_questions"] == 8
    assert result["seed"] == [0, 1]
    assert {"versions", "commit", "seconds"} <= result.keys()
    assert result["command"].startswith("python -m experiments.ablations bias_init --data")
    assert "base model: accuracy" in out
    # Stopped or repeated, it trains nothing again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("model.safetensors")}
    assert command("bias_init", "--seeds", "0,1") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = json.loads((tmp_path / "results" / "bias_init.json").read_text())
    assert again["runs"] == result["runs"]

    # What is written is what the checkpoint does.
    checkpoint = next((tmp_path / "work" / "checkpoints").glob("bias_init=frequency-seed=1"))
    routed = join_routers(checkpoint / "routers")
    tokenizer = load_tokenizer(str(checkpoint))
    questions = load_questions("arc_easy", "test", tmp_path / "questions")
    prompts = [Prompt.of(question, tokenizer, False) for question in questions]
    paths = routed_paths(routed, prompts, batch_size=3)
    assert result["runs"][3]["layers"] == pytest.approx(sum(map(sum, paths)) / 8)
    for prompt, path in zip(prompts, paths, strict=True):
        assert routed_paths(routed, [prompt]) == [path]


def test_draws_of_labels_are_trained_apart(command, tiny_labels, tmp_path):
    other = tmp_path / "other_labels"
    shutil.copytree(tiny_labels, other)
    assert command("draws", "--seeds", "0,1", "--draws", str(tiny_labels), str(other)) == 0
    result = json.loads((tmp_path / "results" / "draws.json").read_text())
    assert result["draws"] == [[str(tiny_labels)], [str(other)]]
    assert len(result["runs"]) == 4 * 2 * 2
    assert {run["draw"] for run in result["runs"]} == {0, 1}
    table = (tmp_path / "results" / "draws.md").read_text()
    assert "| beta auto, last epoch " in table
    assert "2 draws of labels, the mean over 2 training seeds of each" in table


def test_table_of_draws_by_hand():
    runs = [
        {
            "setting": "a",
            "draw": draw,
            "seed": seed,
            "accuracy_arc": accuracy,
            "base_accuracy_arc": 0.5,
            "layers_arc": 8.0,
        }
        | {"base_layers": 10.0}
        for draw, seed, accuracy in [(0, 0, 0.40), (0, 1, 0.42), (1, 0, 0.49), (1, 1, 0.51)]
    ]
    table = draws_table({"runs": runs, "draws": [["x"], ["y"]], "test_questions": 100})
    assert "-9.0 / +0.0 (-4.5 ± 6.4)" in table
    assert "8.0 / 8.0 (8.0 ± 0.0)" in table


def test_a_static_model_answers_as_its_base(tiny_base, questions, tmp_path):
    routed = retrofit(str(tiny_base))
    routed.model.is_static_routing = True
    labels = LabelSet([], Manifest(model=str(tiny_base), dtype="float32"))
    protocol = ablations.protocol_of({"a": labels}, ["arc_easy"], questions)
    bench = ablations.bench_of(protocol, tmp_path / "answers", None)
    result = ablations.evaluate(routed, bench)
    assert result["accuracy"] == result["base_accuracy"]
    assert result["layers"] == result["base_layers"] == 5
    assert (result["wrong_to_right"], result["right_to_wrong"], result["distinct_paths"]) == (0, 0, 1)


def test_summary_by_hand():
    runs = [
        {"panel": "p", "setting": "a", "seed": 0, "accuracy": 0.5, "distinct_paths": 3},
        {"panel": "p", "setting": "b", "seed": 0, "accuracy": 0.1, "distinct_paths": 1},
        {"panel": "p", "setting": "a", "seed": 1, "accuracy": 0.7, "distinct_paths": 5},
    ]
    a, b = summarise(runs)
    assert (a["setting"], a["seeds"]) == ("a", 2)
    assert a["accuracy"] == pytest.approx({"mean": 0.6, "std": 0.02**0.5})
    assert a["distinct_paths"]["mean"] == 4
    assert b["accuracy"] == {"mean": 0.1, "std": 0.0}


def test_bad_seeds(command, capsys):
    assert command("figure7", "--seeds", "0,one") == 2
    assert "--seeds 0,one: expected comma-separated whole numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seeds", "1,2,1"], "the same seed twice"),
        (["--seeds", "0,-1"], "--seeds is -1; it must be between 0 and 4294967295"),
        (["--seeds", "4294967296"], "--seeds is 4294967296; it must be between 0 and 4294967295"),
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--num_epochs", "0"], "--num_epochs is 0; it must be at least 1"),
        (["--warmup_steps", "-1"], "--warmup_steps is -1; it must be at least 0"),
    ],
)
def test_bad_arguments_end_before_training(command, arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(ablations, "train_routers", lambda config: pytest.fail("trained"))
    assert command("figure7", *arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/below"])
@pytest.mark.parametrize("option", ["--output", "--work_dir"])
def test_an_output_below_a_file_ends_before_training(command, option, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablations, "train_routers", lambda config: pytest.fail("trained"))
    (tmp_path / "file").write_text("content")
    assert command("figure7", option, str(tmp_path / place)) == 2
    assert f"error: {option} {tmp_path / place}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "content"


def test_a_folder_in_place_of_the_result_ends_before_training(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablations, "train_routers", lambda config: pytest.fail("trained"))
    (tmp_path / "results" / "figure7.json").mkdir(parents=True)
    assert command("figure7") == 2
    assert "figure7.json is a folder" in capsys.readouterr().err


def test_the_defaults_are_the_papers():
    arguments = parse_arguments(["figure7"])
    assert (arguments.num_epochs, arguments.warmup_steps) == (25, 500)
    assert arguments.data_dir is None


def labels_from(**manifest) -> LabelSet:
    labels = [Label("", (1,), "", name, str(place)) for place, name in enumerate(("dart-2", "arc_easy", "dart-2"))]
    return LabelSet(labels, Manifest(**{"dtype": "float32"} | manifest))


def protocol_of(parts: list[LabelSet], *more):
    return ablations.protocol_of(dict(zip("ab", parts, strict=False)), *more)


def test_test_questions_are_those_of_the_labels_manifest(tmp_path):
    made = protocol_of([labels_from(data_dir=str(tmp_path), chat_template=True)])
    assert (made.sets, made.data_dir, made.chat_template) == (("arc_easy", "dart-2"), tmp_path, True)
    hub = protocol_of([labels_from(data_dir=None)], ["arc_challenge"])
    assert (hub.sets, hub.data_dir, hub.chat_template) == (("arc_challenge",), None, False)
    assert hub.response_format == ResponseFormat()
    arguments = {"max_new_tokens": {"arc_easy": 2, "dart-2": 20}, "inject_boxed": True}
    boxed = protocol_of([labels_from(data_dir=None, arguments=arguments)])
    assert boxed.response_format == ResponseFormat({"dart-2": 20}, inject_boxed=True)
    given = protocol_of([labels_from(data_dir="/elsewhere"), labels_from()], None, tmp_path)
    assert given.data_dir == tmp_path


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([labels_from()], "names no 'data_dir'; pass --data_dir"),
        ([labels_from(data_dir="/nowhere")], "/nowhere does not exist; pass the one to test on as --data_dir"),
        ([labels_from(data_dir="a"), labels_from(data_dir="b")], "come from questions of"),
        (
            [labels_from(data_dir=None), labels_from(data_dir=None, chat_template=True)],
            "the labels of b have chat_template",
        ),
        (
            [labels_from(data_dir=None), labels_from(data_dir=None, arguments={"inject_boxed": True})],
            "the labels of b have response_format",
        ),
    ],
    ids=["no folder", "missing folder", "two folders", "two templates", "two formats"],
)
def test_labels_that_do_not_name_their_test_questions_are_refused(labels, sentence):
    with pytest.raises(UserError, match=sentence):
        protocol_of(labels)
