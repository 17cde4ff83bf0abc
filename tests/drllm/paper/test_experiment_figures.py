"""Figures of the programs' JSON: what is drawn are its numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from drllm.paper import experiment_figures
from drllm.paper.experiment_figures import draw_experiment

RESULTS = Path(__file__).parents[3] / "results"


def row(panel, setting, accuracy):
    numbers = {"macro_f1": 0.4, "f1_skip": 0.3, "f1_execute": 0.7, "f1_repeat": 0.2, "accuracy": accuracy, "layers": 7}
    numbers |= {"base_accuracy": 0.8, "base_layers": 10}
    return {"panel": panel, "setting": setting, "seeds": 2} | {
        name: {"mean": mean, "std": 0.01} for name, mean in numbers.items()
    }


@pytest.fixture
def ablation():
    summary = [row("loss", "focal", 0.5), row("loss", "weighted_ce, inverse frequency", 0.6)]
    return {"ablation": "figure7", "summary": summary, "runs": []}


def test_ablations_are_bars_with_accuracy_and_layers_apart(ablation, tmp_path, drawn):
    assert draw_experiment(ablation, tmp_path / "figure7.png") == [tmp_path / "figure7.png"]
    bars = [list(args[1]) for name, args, _ in drawn if name == "bar"]
    assert bars == [[0.4, 0.4], [0.3, 0.3], [0.7, 0.7], [0.2, 0.2], [50, 60], [7, 7]]
    assert [args[0] for name, args, _ in drawn if name == "axhline"] == [80, 10]
    lines = [options for name, _, options in drawn if name in ("plot", "errorbar")]
    assert all(options["fmt"] == "none" for options in lines)  # errors of bars: categories are not joined
    (labels,) = [args[1] for name, args, _ in drawn if name == "set_xticks"]
    assert labels == ["focal", "weighted ce,\ninverse\nfrequency"]


def test_curves_are_means_over_seeds(ablation, tmp_path, drawn):
    def history(skip):
        values = {"acc_execute": 0.9, "acc_repeat": 0.1, "macro_f1": 0.4}
        return [{"epoch": epoch, "acc_skip": skip + 0.1 * epoch, **values} for epoch in (1, 2)]

    ablation["runs"] = [
        {"panel": "loss", "setting": "focal", "seed": 0, "history": history(0.1)},
        {"panel": "loss", "setting": "focal", "seed": 1, "history": history(0.3)},
        {"panel": "loss", "setting": "ce", "seed": 0, "history": history(0.0)},
    ]
    paths = draw_experiment(ablation, tmp_path / "figure7.png")
    assert [path.name for path in paths] == ["figure7.png", "figure7_curves.png"]
    curves = [(args, options["label"]) for name, args, options in drawn if name == "plot"]
    assert [label for _, label in curves] == ["focal"] * 4 + ["ce"] * 4
    (epochs, means), _ = curves[0]
    assert epochs == (1, 2)
    np.testing.assert_allclose(means, [0.3, 0.4])  # skip accuracy
    np.testing.assert_allclose(curves[3][0][1], [0.4, 0.4])  # macro F1


def test_the_sweep_is_accuracy_against_layers(tmp_path, drawn):
    def point(knob, accuracy, blocks):
        return {"routing_control": knob, "accuracy": accuracy, "accuracy_stderr": 0.01, "blocks_per_query": blocks}

    points = [point(-0.5, 0.7, 8), point(1.0, 0.2, 20), point(-1.0, 0.0, 0), point(0.5, 0.8, 10)]
    probabilities = {"edges": [0, 0.5, 1], "skip": [4, 1], "execute": [1, 4], "repeat": [5, 0]}
    sweep = {"points": points, "base": point(0.5, 0.8, 10), "probabilities": probabilities}
    assert draw_experiment(sweep, tmp_path / "sweep.png") == [tmp_path / "sweep.png"]
    (curve,) = [args for name, args, _ in drawn if name == "errorbar"]
    assert curve == ([0, 8, 10, 20], [0, 70, 80, 20])  # in the order of p, from -1 to 1
    marked = {options["label"]: args[:2] for name, args, options in drawn if name == "plot"}
    assert marked == {"base model": (10, 80), "routers alone, p = -0.5": (8, 70)}
    texts = {args[0] for name, args, _ in drawn if name == "annotate"}
    assert texts == {"p = -0.5", "p = -1", "p = 0.5", "p = 1"}


def test_points_of_unrelated_methods_are_not_joined(tmp_path, drawn):
    def method(name, accuracy, layers):
        return {"method": name, "accuracy": accuracy, "layers": layers, "against_base": {"low": -2, "high": 0}}

    rows = [method("base", 0.8, 10), method("static: 1 skipped", 0.7, 9), method("static: 2 skipped", 0.6, 8)]
    rows += [
        method("paper", 0.7, 8),
        method("random decisions, at the rates of paper", 0.5, 8),
        method("random decisions, at the rates of other", 0.6, 9),
    ]
    assert draw_experiment({"rows": rows}, tmp_path / "claim.png") == [tmp_path / "claim.png"]
    lines = {options["label"]: (list(args[0]), options["ls"]) for name, args, options in drawn if name == "errorbar"}
    assert lines == {
        "base": ([10], "none"),
        "static": ([9, 8], ":"),
        "paper": ([8], "none"),
        "random decisions, at the rates of paper": ([8], "none"),
        "random decisions, at the rates of other": ([9], "none"),
    }


def test_latency_and_concurrency(tmp_path, drawn):
    def timed(rows, saved, ratio):
        return {"batch_size": 1, "rows": rows, "layers_saved": saved, "total_ratio": ratio}

    rows = [timed("shared", 0.2, 0.75), timed("shared", 0.1, 0.9), timed("mixed", 0.1, 1.1)]
    assert draw_experiment({"rows": rows}, tmp_path / "latency.png")
    cases = {options["label"]: args for name, args, options in drawn if name == "plot"}
    np.testing.assert_allclose(cases["batch 1, shared"], ([10, 20], [10, 25]))
    np.testing.assert_allclose(cases["batch 1, mixed"], ([10], [-10]))
    points = [{"questions_at_once": 1, "simulations_per_s": 80}, {"questions_at_once": 8, "simulations_per_s": 320}]
    assert draw_experiment({"figures": {"points": points}}, tmp_path / "concurrency.png")
    assert drawn[-2][1] == ([1, 8], [80, 320]) or drawn[-1][1][0] == [1, 8]


def test_other_json_has_no_figure(tmp_path):
    assert draw_experiment({"rows": [], "figures": {"gain": 1.0}}, tmp_path / "x.png") == []
    assert draw_experiment({}, tmp_path / "x.png") == []
    assert not (tmp_path / "x.png").exists()
    assert experiment_figures.draw_curves({"runs": [{"panel": "p", "setting": "s"}]}, tmp_path / "x.png") is None


def test_every_checked_in_json_with_a_figure_is_drawn(tmp_path):
    names = (
        "miniature/ablations/figure5",
        "miniature/claim/claim",
        "miniature/seeds/sweep",
        "speed/latency_decode",
        "speed/search_concurrency",
    )
    for name in names:
        paths = draw_experiment(json.loads((RESULTS / f"{name}.json").read_text()), tmp_path / f"{Path(name).name}.png")
        assert paths[0].stat().st_size > 10_000
