import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from drllm.evaluation import figures
from tests.drllm.evaluation.test_tables import make_run


@pytest.fixture
def folder(tmp_path):
    correct = {"drllm_arc_easy": [1, 0], "drllm_dart_1": [0, 0]}
    blocks = {"drllm_arc_easy": [8, 9], "drllm_dart_1": [20, 12]}
    for name in ("base", "router", "path-0112"):
        run = make_run(tmp_path, name, correct, blocks)
        results = json.loads((run / "results.json").read_text())
        shares = {"skip": [0.1, 0, 0, 1], "execute": [0.9, 1, 0, 0], "repeat": [0, 0, 1, 0]}
        results["config"]["block_applications"] = {task: {"queries": 2, "share_per_block": shares} for task in correct}
        (run / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_figures_of_a_comparison(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["figures", "comparison", str(folder)])
    assert figures.main() == 0
    paths = capsys.readouterr().out.split()
    assert len(paths) == 3
    for path in paths:
        assert Path(path).stat().st_size > 5000


def test_points_and_shares_are_those_of_the_runs(folder):
    runs = figures.load_runs(folder)
    tasks, shares = figures._shares(runs[1])
    assert tasks == ["drllm_arc_easy", "drllm_dart_1"]
    np.testing.assert_allclose(shares.sum(-1), 1)
    assert shares[0, 0].tolist() == [0.1, 0.9, 0]


def test_label_figure_counts_the_labels(tmp_path, monkeypatch):
    labels = SimpleNamespace(rows=[{"optimal_layer_config": [0, 1, 1]}, {"optimal_layer_config": [2, 1, 1]}])
    drawn = []
    monkeypatch.setattr("drllm.labels.read_labels", lambda folder: labels)
    monkeypatch.setattr(figures, "_stacked_bars", lambda axis, shares: drawn.append(shares))
    figures.draw_labels(tmp_path, tmp_path / "labels.png")
    assert drawn[0].tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0, 1, 0]]


def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys):
    for what, source in (("labels", tmp_path / "nowhere"), ("comparison", tmp_path), ("sweep", tmp_path / "cut.json")):
        (tmp_path / "cut.json").write_text('{"points": ')
        monkeypatch.setattr("sys.argv", ["figures", what, str(source)])
        assert figures.main() == 2
        assert capsys.readouterr().err.startswith("error: ")
