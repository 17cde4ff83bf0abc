"""Table 5 on a toy, by both rewards: every row, resumed without scoring anything again."""

import json

import pytest

from drllm.rivals import benches
from experiments import rivals
from tests import search_toys
from tests.eval_toys import make_routed, make_tasks


@pytest.fixture(scope="module")
def toy(tmp_path_factory, stock_model):
    """(base, routed checkpoint, data with train and test questions)."""
    folder = tmp_path_factory.mktemp("rivals")

    base = search_toys.make_model(folder / "model", stock_model)
    data = search_toys.make_data(folder / "data", 8, seed=5)
    make_tasks(data, 4)
    return base, make_routed(base, folder / "routed"), data


@pytest.mark.parametrize("reward", ["likelihood", "generation"])
def test_table_has_every_rival_and_a_second_run_answers_nothing(toy, tmp_path, monkeypatch, reward):
    base, routed, data = toy
    arguments = f"--model {base} --data_dir {data} --sets arc_easy --reward {reward} --skips 2 --epochs 1 --seeds 2"
    arguments += f" --checkpoint published={routed} --ceiling_questions 2 --work_dir {tmp_path}/work"
    arguments += f" --output {tmp_path}/result.json"
    assert rivals.main(arguments.split()) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    rows = {row["method"].split(", knob")[0]: row for row in result["rows"]}
    assert rows["base"]["layers"] == pytest.approx(6)
    for name in ("ShortGPT", "LayerSkip early exit", "random skips"):
        assert rows[name]["layers"] == pytest.approx(4)
    assert [rows[name]["seeds"] for name in ("MindSkip", "FlexiDepth", "ShortGPT")] == [2, 2, 1]
    assert rows["MindSkip"]["cost"]["parameters"] == 6 * 33
    assert not any(row["cost"]["changes_base"] for row in result["rows"])
    assert {"Dr.LLM published", "random, rates of Dr.LLM published", "CoLa ceiling (uses the test answer)"} < set(rows)
    assert "| MindSkip " in (tmp_path / "result.md").read_text()

    def nothing(*_arguments, **_options):
        raise AssertionError("scored again")

    for name in ("LikelihoodEngine", "RolloutEngine"):
        monkeypatch.setattr(getattr(benches, name), "respond", nothing)
        monkeypatch.setattr(getattr(benches, name), "_run", nothing)
    assert rivals.main(arguments.split()) == 0
    again = json.loads((tmp_path / "result.json").read_text())["rows"]
    for row, before in zip(again, result["rows"], strict=True):
        assert row["accuracy"] == before["accuracy"], row["method"]
        assert row["layers"] == pytest.approx(before["layers"], abs=1e-4), row["method"]  # stored with five digits


def test_bad_input_is_one_sentence(toy, tmp_path, capsys):
    base, _, data = toy
    common = f"--model {base} --data_dir {data} --sets arc_easy --output {tmp_path}/r.json --work_dir {tmp_path}/w"
    for extra, sentence in (
        ("--checkpoint nameless", "--checkpoint nameless: expected NAME=FOLDER"),
        ("--methods mindskip,luck", "'luck' is not a method; choose from shortgpt, layerskip, mindskip"),
        ("--skips 6", "--skips 6: the model has only 6 blocks"),
    ):
        assert rivals.main([*common.split(), *extra.split()]) == 2
        assert sentence in capsys.readouterr().err
