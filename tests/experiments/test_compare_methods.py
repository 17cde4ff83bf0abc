"""The comparison with controls: its arithmetic, its guard against shared questions, and one small run."""

import json
import shutil

import pytest

from experiments.ablations import MINIATURE_DATA
from experiments.compare_methods import Outcome, difference, main, mixture, summary


def test_a_mixture_has_the_layers_it_is_asked_for():
    one, other = Outcome([1.0, 0.0], [8.0, 8.0]), Outcome([1.0, 1.0], [10.0, 10.0])
    between = mixture([other, one], 8.5)
    assert between.mean_layers == pytest.approx(8.5)
    assert between.right == pytest.approx([1.0, 0.25])
    assert mixture([one, other], 7.9) is None
    assert mixture([one, other], 10.0).right == [1.0, 1.0]


def test_differences_are_paired_by_question():
    one, other = Outcome([1.0, 1.0, 0.0, 1.0], [9.0] * 4), Outcome([1.0, 0.0, 0.0, 1.0], [10.0] * 4)
    found = difference(one, other)
    assert found["points"] == pytest.approx(25)
    # The differences 0, 1, 0, 0 have a standard deviation of 1/2, their mean of 4 one of 1/4.
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 25)
    assert difference(one, one) == {"points": 0, "low": 0, "high": 0}


def test_rows_average_over_seeds():
    base = Outcome([1.0, 0.0], [10.0, 10.0])
    row = summary("effects", [Outcome([1.0, 1.0], [8.0, 9.0]), Outcome([1.0, 0.0], [9.0, 10.0])], base, [base])
    assert (row["accuracy"], row["layers"]) == (0.75, 9.0)
    assert row["accuracy_std"] == pytest.approx(0.5**0.5 / 2)
    assert row["against_base"]["points"] == pytest.approx(25)
    assert "against_static" not in row


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


def test_more_questions_than_there_are_are_refused(tmp_path, capsys):
    assert main([*SMALL, "--train_questions", "800", "--output", str(tmp_path / "c.json")]) == 2
    assert "arc_easy has 800 training questions" in capsys.readouterr().err


def test_methods_are_checked(capsys):
    assert main(["--methods", "effects,none_such"]) == 2
    assert "'none_such' is none" in capsys.readouterr().err
    assert main(["--methods", "paper"]) == 2
    assert "--methods paper needs the labels" in capsys.readouterr().err


def test_one_command_makes_table_figure_and_json(tmp_path, capsys):
    output = tmp_path / "claim.json"
    main([*SMALL, "--train_questions", "12", "--oracle_questions", "2", "--output", str(output)])
    result = json.loads(output.read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert {"base", "static: 1 skipped", "influence: 2 skipped", "early exit: 1 skipped", "effects"} < set(rows)
    assert rows["random: rates of effects"]["layers"] == pytest.approx(rows["effects"]["layers"])
    assert rows["base"]["layers"] == 10
    assert rows["static: 2 skipped"]["layers"] == 8
    assert result["test_questions"] == 12
    assert result["oracle"]["questions"] == 4
    assert set(result["details"]["effects"]["on_training_questions"]) == {"base", "labels followed", "routers"}
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "| effects |" in capsys.readouterr().out
