"""The comparison with controls: its guard against shared questions, bad arguments, and one small run."""

import json
import shutil

import pytest

from drllm.miniature import MINIATURE_DATA, ROOT
from experiments import compare_methods
from experiments.compare_methods import main, parse_arguments
from extensions.groups import search as group_search
from tests.training_toys import make_labels

SETTINGS = {
    "sets": "arc_easy,dart-1",
    "seeds": 1,
    "price_seeds": 1,
    "validation_questions": 4,
    "test_questions": 6,
    "static_questions": 6,
}
SMALL = [text for name, value in SETTINGS.items() for text in (f"--{name}", str(value))]


def test_shared_questions_are_refused(tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(MINIATURE_DATA, data)
    lines = (data / "arc_easy_train.jsonl").read_text().splitlines()
    lines[3] = (data / "arc_easy_test.jsonl").read_text().splitlines()[2]
    (data / "arc_easy_train.jsonl").write_text("\n".join(lines) + "\n")
    output = str(tmp_path / "c.json")
    assert main([*SMALL, "--train_questions", "8", "--data_dir", str(data), "--output", output]) == 2
    assert "1 test questions are also training questions" in capsys.readouterr().err


def test_too_many_training_questions_are_refused(tmp_path, capsys):
    assert main([*SMALL, "--train_questions", "800", "--output", str(tmp_path / "c.json")]) == 2
    assert "arc_easy has 800 training questions" in capsys.readouterr().err


def test_methods_are_checked(capsys):
    assert main(["--methods", "group_paths,none_such"]) == 2
    assert "'none_such' is not a method; choose from paper, group_paths" in capsys.readouterr().err
    assert main(["--methods", "paper"]) == 2
    assert "--methods paper needs the labels" in capsys.readouterr().err


def test_one_command_makes_table_figure_and_json(tmp_path, capsys):
    output = tmp_path / "comparison.json"
    folders = ["--work_dir", str(tmp_path / "work"), "--output", str(output)]
    assert main([*SMALL, "--train_questions", "12", "--oracle_questions", "2", *folders]) == 0
    result = json.loads(output.read_text())
    assert result["command"].startswith("python -m experiments.compare_methods --sets arc_easy,dart-1")
    assert result["seed"] == [0]
    assert {"versions", "commit", "seconds"} <= result.keys()
    rows = {row["method"]: row for row in result["rows"]}
    assert {"base", "static: 1 skipped", "influence: 2 skipped", "early exit: 1 skipped", "group paths"} < set(rows)
    assert rows["random: rates of group paths"]["layers"] == pytest.approx(rows["group paths"]["layers"])
    assert rows["base"]["layers"] == 10
    assert rows["static: 2 skipped"]["layers"] == 8
    assert result["test_questions"] == 12
    assert result["oracle"]["questions"] == 4
    assert set(result["details"]["group paths"]["on_training_questions"]) == {"base", "labels followed", "routers"}
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "| group paths |" in capsys.readouterr().out


def test_known_paths_and_labels_of_groups_add_rows_and_the_share_that_each_method_recovers(tmp_path):
    control = ROOT / "miniature" / "positive_control"
    output = tmp_path / "comparison.json"
    settings = ["--train_questions", "12", "--oracle_questions", "0", "--most_skips", "1", "--static_questions", "6"]
    settings += ["--sets", "dart-1,dart-5", "--test_questions", "40", "--known_paths", str(control / "paths.json")]
    labels = ["--model", str(control / "model"), "--data_dir", str(MINIATURE_DATA), "--dataset", "dart-1,dart-5"]
    labels += ["--limit", "6", "--groups", "2", "--num_simulations", "2", "--output_dir", str(tmp_path / "labels")]
    assert group_search.main(labels) == 0
    settings += ["--group_labels", str(tmp_path / "labels"), "--num_epochs", "1", "--warmup_steps", "1"]
    folders = ["--model", str(control / "model"), "--work_dir", str(tmp_path / "work"), "--output", str(output)]
    assert main([*SMALL, *settings, *folders]) == 0
    result = json.loads(output.read_text())
    rows = {row["method"]: row for row in result["rows"]}
    shared = "published, reward shared by groups"
    assert rows[f"random: rates of {shared}"]["layers"] == pytest.approx(rows[shared]["layers"])
    quality = result["details"]["labels against known paths"][shared]
    assert quality["agreement"]["questions"] == 12
    assert rows["known paths"]["layers"] < rows["base"]["layers"] == 14
    assert rows["known paths"]["recovered"]["share"] == 1
    assert rows["base"]["recovered"]["share"] == 0
    assert rows["routers on known paths"]["layers"] < 14
    table = output.with_suffix(".md").read_text()
    assert "share of the known gain" in table
    assert f"the questions they were made from ({shared})" in table


def test_questions_are_answered_and_graded_as_the_labels_were_made(tmp_path):
    labels = make_labels(tmp_path / "labels", ROOT / "miniature" / "model")
    manifest = json.loads((labels / "manifest.json").read_text())
    manifest["arguments"] = manifest.get("arguments", {}) | {"max_new_tokens": {"dart-1": 3}, "strict_letters": True}
    (labels / "manifest.json").write_text(json.dumps(manifest))
    folders = ["--work_dir", str(tmp_path / "work"), "--output", str(tmp_path / "comparison.json")]
    arguments = parse_arguments([*SMALL, "--train_questions", "2", "--labels", str(labels), *folders])
    comparison = compare_methods.Comparison(arguments)
    prompts = [*comparison.test.prompts, *(answered.prompt for answered in comparison.train)]
    assert {prompt.response_format.strict_letters for prompt in prompts} == {True}
    assert {prompt.max_new_tokens for prompt in prompts if prompt.question.set == "dart-1"} == {3}


def test_the_defaults_are_the_papers():
    arguments = parse_arguments([])
    assert (arguments.num_epochs, arguments.warmup_steps) == (25, 500)
    assert arguments.methods == ["group_paths"]
    assert parse_arguments(["--labels", "data"]).methods == ["group_paths", "paper"]
    assert parse_arguments(["--group_labels", "data"]).methods == ["group_paths", "group_search"]


def test_labels_with_other_prompts_are_refused_together(tmp_path, capsys):
    base = ROOT / "miniature" / "model"
    folders = [make_labels(tmp_path / name, base) for name in ("labels", "group_labels")]
    manifest = json.loads((folders[1] / "manifest.json").read_text())
    manifest["arguments"] |= {"strict_letters": True}
    (folders[1] / "manifest.json").write_text(json.dumps(manifest))
    labels = ["--labels", str(folders[0]), "--group_labels", str(folders[1])]
    assert main([*SMALL, *labels, "--output", str(tmp_path / "c.json")]) == 2
    assert "--labels and --group_labels were made with different prompts or graders" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["--most_skips", "-1"], "--most_skips is -1; it must be at least 0"),
        (["--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["--price_seeds", "0"], "--price_seeds is 0; it must be at least 1"),
        (["--train_questions", "0"], "--train_questions is 0; it must be at least 1"),
        (["--validation_questions", "0"], "--validation_questions is 0; it must be at least 1"),
        (["--static_questions", "0"], "--static_questions is 0; it must be at least 1"),
        (["--test_questions", "1"], "--test_questions is 1; it must be at least 2"),
        (["--oracle_questions", "-1"], "--oracle_questions is -1; it must be at least 0"),
        (["--num_epochs", "0"], "--num_epochs is 0; it must be at least 1"),
        (["--warmup_steps", "-1"], "--warmup_steps is -1; it must be at least 0"),
        (["--groups", "0"], "--groups is 0; it must be at least 1"),
        (["--save", "2"], "--save is 2.0; it must be between 0 and 1"),
        (["--sets", "none_such"], "none_such"),
        (["--labels", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_end_before_the_model_is_loaded(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare_methods, "load_routed", lambda *given: pytest.fail("the model was loaded"))
    assert main([*arguments, "--output", str(tmp_path / "c.json")]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("option", "place"), [("--output", "file/c.json"), ("--output", "."), ("--work_dir", "file")])
def test_outputs_that_cannot_be_written_end_before_the_model_is_loaded(option, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare_methods, "load_routed", lambda *given: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    assert main([option, str(tmp_path / place)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {option} {tmp_path}")
