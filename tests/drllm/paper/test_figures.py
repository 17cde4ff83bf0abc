"""Figures over questions: what is drawn are the numbers of the runs and labels."""

import json
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest

from drllm.evaluation.results import load_runs
from drllm.paper import figures
from drllm.paper.result_files import find_evaluations
from drllm.paper.style import ACTION_COLOURS, series
from tests.eval_toys import make_run

SHARES = {"skip": [0.1, 0, 0, 1], "execute": [0.9, 1, 0, 0], "repeat": [0, 0, 1, 0]}


def add_shares(run, shares=SHARES):
    """Counted paths of a run: these shares per block for every task."""
    results = json.loads((run / "results.json").read_text())
    tasks = results["results"]
    results["config"]["block_applications"] = {task: {"queries": 2, "share_per_block": shares} for task in tasks}
    (run / "results.json").write_text(json.dumps(results))


@pytest.fixture
def folder(tmp_path):
    correct = {"drllm_arc_easy": [1, 0], "drllm_dart_1": [0, 0]}
    routed = {"drllm_arc_easy": [1, 1], "drllm_dart_1": [1, 0]}
    fewer, blocks = (
        {"drllm_arc_easy": [6, 7], "drllm_dart_1": [10, 6]},
        {"drllm_arc_easy": [8, 9], "drllm_dart_1": [20, 12]},
    )
    folder = tmp_path / "evaluation"
    for name, right, layers in (("base", correct, blocks), ("router", routed, fewer), ("path-0112", correct, fewer)):
        add_shares(make_run(folder, name, right, layers, base_model="org/model"))
    return folder


def is_drawing(path):
    """A PNG in which something is drawn in colour."""
    pixels = matplotlib.image.imread(path)[..., :3]
    return np.ptp(pixels, axis=2).max() > 0.3


def test_figures_of_a_comparison(folder):
    (folder / "label_counts.json").write_text(json.dumps({"dart-1": [1, 2, 1], "arc_easy": [0, 4, 0]}))
    paths = figures.draw_comparison(folder, folder / "figures")
    assert [path.name for path in paths] == ["accuracy_layers.png", "usage.png", "usage_thirds.png", "labels.png"]
    assert all(is_drawing(path) for path in paths)
    (folder / "label_counts.json").unlink()
    assert len(figures.draw_comparison(folder, folder / "figures")) == 3


def test_accuracy_against_layers_with_an_arrow_to_the_router(folder, drawn):
    figures.draw_accuracy(load_runs(folder), folder / "a.png")
    points = [(args[0], args[1], options["label"]) for name, args, options in drawn if name == "errorbar"]
    assert points[:3] == [(8.5, 50, "base"), (6.5, 100, "+ router"), (6.5, 50, "path-0112")]
    assert points[6][:2] == ((8.5 + 16) / 2, 25)  # Total, every set with the same weight
    arrows = [args[1:] for name, args, _ in drawn if name == "annotate"]
    assert arrows[0] == ((6.5, 100), (8.5, 50))
    assert len(arrows) == 3  # one per panel, none to the static path


def test_usage_is_the_mean_of_skip_0_execute_1_repeat_2(folder, drawn):
    run = load_runs(folder)[1]
    tasks, values = figures.usage([run])
    assert tasks == ["drllm_arc_easy", "drllm_dart_1"]
    np.testing.assert_allclose(values, [[0.9, 1, 2, 0]] * 2)
    add_shares(folder / "path-0112", {"skip": [0] * 4, "execute": [1] * 4, "repeat": [0] * 4})
    np.testing.assert_allclose(figures.usage([run, load_runs(folder)[2]])[1], [[0.95, 1, 1.5, 0.5]] * 2)
    figures.draw_usage({"model": [run]}, folder / "u.png")
    image = next(call for call in drawn if call[0] == "imshow")
    np.testing.assert_allclose(image[1][0], values)
    assert (image[2]["vmin"], image[2]["vmax"]) == (0, 2)


def test_boxes_are_of_early_middle_and_late_layers(folder, drawn):
    figures.draw_usage_boxes({"model": load_runs(folder)[1:2]}, folder / "b.png")
    boxes = [args[0] for name, args, _ in drawn if name == "boxplot"]
    assert [box.shape for box in boxes] == [(2, 2), (1, 2), (1, 2)]  # layers, sets
    np.testing.assert_allclose(boxes[0][:, 0], [0.9, 1])
    np.testing.assert_allclose([boxes[1][0, 0], boxes[2][0, 0]], [2, 0])


def test_labels_are_counted_per_set(tmp_path, monkeypatch, drawn):
    paths = [("dart-1", (0, 1, 1, 2)), ("arc_easy", (2, 1, 1, 1)), ("dart-1", (1, 1, 1, 1))]
    labels = [SimpleNamespace(set=name, path=path) for name, path in paths]
    monkeypatch.setattr(figures, "read_labels", lambda folder: SimpleNamespace(labels=labels))
    figures.write_label_counts(tmp_path, tmp_path)
    counts = figures.read_label_counts(tmp_path)
    assert counts == {"dart-1": [1, 6, 1], "arc_easy": [0, 3, 1]}
    figures.draw_labels({"model": counts}, tmp_path / "l.png")
    bars = {options["label"]: list(args[1]) for name, args, options in drawn if name == "bar"}
    assert bars == {"skip": [0, 12.5], "execute": [75, 75], "repeat": [25, 12.5]}  # ARC first


def test_figures_over_models_average_them(folder, tmp_path, drawn):
    second = tmp_path / "second"
    for name in ("base", "router"):
        right, layers = (
            {"drllm_arc_easy": [1, 1], "drllm_dart_1": [1, 1]},
            {"drllm_arc_easy": [2, 3], "drllm_dart_1": [4, 4]},
        )
        add_shares(make_run(second, name, right, layers, base_model="meta-llama/Llama-3.2-3B"))
    (second / "label_counts.json").write_text(json.dumps({"dart-1": [1, 2, 1]}))
    evaluations = find_evaluations(tmp_path)
    assert list(figures.by_base_model(evaluations)) == ["LLaMA-3B-Base", "org/model"]
    paths = figures.draw_over_models(evaluations, tmp_path / "out")
    assert [path.name for path in paths] == ["figure1.png", "figure4a_figure10.png", "figure4bc.png", "figure9.png"]
    points = [args[:2] for name, args, options in drawn if name == "plot" and "label" in options]
    assert points[:2] == [((8.5 + 2.5) / 2, (50 + 100) / 2), ((6.5 + 2.5) / 2, 100)]  # ARC of ours
    paper = [103.9, 106.9, 56.0, 56.0, 115.7, 112.0], [73.5, 88.5, 48.0, 22.5, 53.0, 94.5]
    assert points[2] == pytest.approx(tuple(map(np.mean, paper)))
    assert figures.draw_over_models([], tmp_path / "none") == []


def _lightness(colour):
    """CIE L* of an sRGB colour, 0 to 100."""
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in matplotlib.colors.to_rgb(colour)
    ]
    luminance = np.dot(linear, (0.2126, 0.7152, 0.0722))
    return 116 * luminance ** (1 / 3) - 16


def test_colours_of_actions_differ_in_grey():
    lightness = sorted(_lightness(colour) for colour in ACTION_COLOURS.values())
    assert min(np.diff(lightness)) > 20
    styles = [(series(number).marker, series(number).line) for number in range(7)]
    assert len({marker for marker, _ in styles}) == len({line for _, line in styles}) == 7
