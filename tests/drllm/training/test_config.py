"""Arguments are checked before anything is loaded."""

import json

import pytest

from drllm.errors import UserError
from drllm.training.config import RouterTrainingConfig
from drllm.training.trainer import train_routers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1}, r"--seed is -1; it must lie in 0\.\.4294967295"),
        ({"seed": 2**32}, "--seed is 4294967296"),
        ({"num_epochs": 0}, "--num_epochs is 0; it must be greater than 0"),
        ({"num_epochs": -3}, "--num_epochs is -3"),
        ({"learning_rate": float("inf")}, "--learning_rate is inf; it must be a finite number"),
        ({"learning_rate": float("nan")}, "--learning_rate is nan"),
        ({"weight_decay": -0.1}, "--weight_decay is -0.1; it must not be negative"),
        ({"warmup_steps": -1}, "--warmup_steps is -1"),
        ({"gradient_accumulation": 0}, "--gradient_accumulation is 0"),
        ({"micro_batch_size": 0}, "--micro_batch_size is 0"),
        ({"micro_batch_size": 5}, "--gradient_accumulation 16 .* is not a multiple of --micro_batch_size 5"),
        ({"num_windows": 0}, "--num_windows is 0"),
        ({"num_windows": 33}, r"--num_windows is 33; it must lie in 1\.\.32"),
        ({"router_width": 0}, "--router_width is 0"),
        ({"router_depth": 0}, "--router_depth is 0"),
        ({"feature_batch_size": 0}, "--feature_batch_size is 0"),
        ({"logging_steps": 0}, "--logging_steps is 0"),
        ({"gamma": -1.0}, "--gamma is -1.0"),
        ({"beta": "1.5"}, "--beta is 1.5; it must be auto or lie in"),
        ({"beta": "nan"}, "--beta is nan; it must be auto or lie in"),
        ({"beta": "few"}, "--beta is few; it must be auto or lie in"),
        ({"eval_fraction": 1.0}, "--eval_fraction is 1.0"),
        ({"eval_fraction": -0.1}, "--eval_fraction is -0.1"),
        ({"loss": "hinge"}, "--loss is 'hinge'; choose one of focal, weighted_ce, ce"),
        ({"paths": "some"}, "--paths is 'some'"),
        ({"keep": "first"}, "--keep is 'first'; choose one of best, last"),
        ({"bias_init": "ones"}, "--bias_init is 'ones'"),
        ({"router_input": "logits"}, "--router_input is 'logits'"),
        ({"report_to": "paper"}, "--report_to is 'paper'"),
        ({"dtype": "int3"}, "unknown dtype 'int3'"),
        ({"run_name": ""}, "--run_name is empty"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(UserError, match=message):
        train_routers(RouterTrainingConfig(data=["nowhere"], **fields))


def test_more_processes_than_examples_per_step():
    RouterTrainingConfig(gradient_accumulation=16).check(processes=8)
    with pytest.raises(UserError, match="is not a multiple of --micro_batch_size 1 times 32 processes"):
        RouterTrainingConfig(gradient_accumulation=16).check(processes=32)


def test_where_output_goes_is_checked_first(tiny_labels, tmp_path):
    (tmp_path / "file").write_text("")
    for fields, message in (
        ({"output_dir": str(tmp_path / "file")}, "--output_dir .* is below the file"),
        ({"output_dir": str(tmp_path / "file" / "a")}, "--output_dir .* is below the file"),
        ({"output_dir": str(tmp_path), "run_name": "file"}, "--output_dir .* is a file; pass a folder"),
        ({"output_dir": str(tmp_path), "features_dir": str(tmp_path / "file")}, "--features_dir .* is a file"),
    ):
        with pytest.raises(UserError, match=message):
            train_routers(RouterTrainingConfig(data=["nowhere"], **fields))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["README.md", "manifest.json", "labels.jsonl"])
def test_data_that_is_a_file(name, tiny_labels, tmp_path):
    path = tiny_labels / name
    if name == "README.md":
        path = tmp_path / name
        path.write_text("# Data\n")
    with pytest.raises(UserError, match=rf"{name}"):
        train_routers(RouterTrainingConfig(data=[str(path)], output_dir=str(tmp_path)))


def test_labels_that_are_a_folder(tiny_labels, tmp_path):
    (tmp_path / "data" / "labels.jsonl").mkdir(parents=True)
    (tmp_path / "data" / "manifest.json").write_text((tiny_labels / "manifest.json").read_text())
    with pytest.raises(UserError, match=r"labels\.jsonl cannot be read \(Is a directory\)"):
        train_routers(RouterTrainingConfig(data=[str(tmp_path / "data")], output_dir=str(tmp_path)))


def test_labels_with_and_without_a_manifest_are_not_mixed(tiny_labels, tmp_path):
    row = {"question": "w1", "optimal_layer_config": [1] * 5, "answer": "A"}
    (tmp_path / "paths.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"with and without a manifest\.json cannot be mixed"):
        train_routers(RouterTrainingConfig(data=[str(tiny_labels), str(tmp_path)], output_dir=str(tmp_path)))
