"""Effects that the prompt tells are told from those that it does not; the program runs on a toy."""

import json

import pytest
import torch

from experiments import group_paths, predictable_effects
from experiments.predictable_effects import predictability
from tests import search_toys
from tests.search_toys import toy_windows


def test_a_policy_gains_only_where_the_prompt_tells_the_effect():
    windows, mask = toy_windows(300)
    told = torch.where(windows[:, 0, 0, 0] > 0, 0.1, -0.1)
    generator = torch.Generator().manual_seed(0)
    luck = torch.randn(300, generator=generator) * 0.1
    noise = torch.randn(300, generator=generator) * 0.02

    found = predictability(torch.stack([told + noise, luck], 1), windows, mask)
    assert found["correlation"][0] > 0.7
    assert abs(found["correlation"][1]) < 0.2
    assert found["predicted"]["mean"] > 0.03
    assert found["predicted"]["mean"] > found["constant"]["mean"] + 4 * found["constant"]["error"]

    found = predictability(luck[:, None] + 0.05, windows, mask)
    assert found["constant"]["mean"] == pytest.approx(found["mean"][0], abs=1e-6)
    assert found["predicted"]["mean"] < found["constant"]["mean"] + found["constant"]["error"]


def test_the_program_reads_stored_scores(tmp_path, capsys, stock_model):
    search_toys.make_model(tmp_path / "model", stock_model)
    data = search_toys.make_data(tmp_path / "data", 48, seed=5)
    common = f"--model {tmp_path}/model --data_dir {data} --dataset arc --train_questions 24 --batch_size 4"
    measure = f"--reward likelihood {common} --group_by collection --pilot 24 --keep 3 --most_skips 1"
    assert group_paths.main([*measure.split(), "--output_dir", str(tmp_path / "groups")]) == 0
    scores = tmp_path / "groups-measured"
    before = {path: path.read_bytes() for path in scores.glob("*.jsonl")}
    arguments = [*common.split(), "--scores", str(scores), "--output", str(tmp_path / "predictable.json")]
    assert predictable_effects.main(arguments) == 0
    assert {path: path.read_bytes() for path in scores.glob("*.jsonl")} == before, "nothing is measured anew"
    rows = json.loads((tmp_path / "predictable.json").read_text())["rows"]
    assert {row["collection"] for row in rows} == {"arc"}
    assert [row["edits"] for row in rows[-2:]] == ["one path for all", "each along its predicted best path"]
    assert all(-1 <= row["correlation"] <= 1 for row in rows[:-2])
    assert "| arc | " in capsys.readouterr().out
    assert predictable_effects.main([*arguments, "--dtype", "bfloat16"]) == 2
    assert "holds scores of" in capsys.readouterr().err
