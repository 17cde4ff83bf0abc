"""The command line of the figures: all that a folder of results allows, in its place."""

import json
import shutil
from pathlib import Path

from experiments.paper_figures import main

RESULTS = Path(__file__).parents[2] / "results"


def test_all_figures_of_a_folder_of_results(tmp_path, capsys):
    for name in ("demo", "seeds", "ablations", "claim"):
        shutil.copytree(RESULTS / "miniature" / name, tmp_path / name, ignore=shutil.ignore_patterns("*.png"))
    assert main([str(tmp_path)]) == 0
    paths = {str(Path(line).relative_to(tmp_path)) for line in capsys.readouterr().out.splitlines()}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")} == paths
    expected = {f"figures/{name}.png" for name in ("figure1", "figure4a_figure10", "figure4bc", "figure9")}
    expected |= {"demo/figures/accuracy_layers.png", "seeds/sweep.png", "claim/claim.png"}
    expected |= {"ablations/figure5.png", "ablations/figure7.png", "ablations/figure8.png", "ablations/table6.png"}
    assert expected <= paths


def test_figures_of_checkpoints_and_unknown_files_are_left_out(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name, content in (
        ("config", {}),
        ("training", {"ablation": "figure7"}),
        ("../list", [1]),
        ("../other", {"a": 1}),
    ):
        (checkpoint / f"{name}.json").write_text(json.dumps(content))
    assert main([str(tmp_path)]) == 2
    assert f"nothing below {tmp_path} has a figure" in capsys.readouterr().err


def test_bad_input_is_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    (tmp_path / "sweep.json").write_text('{"points": ')
    assert main([str(tmp_path)]) == 2
    assert "sweep.json: not valid JSON" in capsys.readouterr().err
