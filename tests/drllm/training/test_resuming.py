"""Folders that hold something else, two trainings at once, full disks."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from drllm.errors import UserError
from drllm.training.config import RouterTrainingConfig
from drllm.training.trainer import train_routers

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config(tiny_labels, tmp_path):
    def make(**fields) -> RouterTrainingConfig:
        fields = {"num_epochs": 2, "warmup_steps": 1, "output_dir": str(tmp_path / "out")} | fields
        return RouterTrainingConfig(data=[str(tiny_labels)], features_dir=str(tmp_path / "features"), **fields)

    return make


def test_a_second_training_in_the_folder_is_refused_while_the_first_runs(config):
    folder = config().checkpoint / "trainer"
    folder.mkdir(parents=True)
    with (folder / "lock").open("a") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another training is running in .*drllm; wait for it, or pass another"):
            train_routers(config())
    train_routers(config())  # the lock went with its process


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"training\.json: not valid JSON"),
        ('{"identity": {', r"training\.json: not valid JSON"),
        ("[]", r"training\.json: expected an object"),
        ("{}", r"training\.json: no valid field 'identity'"),
        ('{"identity": 3}', r"training\.json: no valid field 'identity'"),
        ("[" * 100_000, r"training\.json: not valid JSON"),
    ],
)
def test_a_damaged_record(content, message, config):
    folder = config().checkpoint
    folder.mkdir(parents=True)
    (folder / "training.json").write_text(content)
    with pytest.raises(UserError, match=rf"{message}.*; pass another --run_name, or --overwrite"):
        train_routers(config())


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_damaged_settings_of_an_unfinished_run(content, config):
    folder = config().checkpoint / "trainer"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json.*; pass another --run_name, or --overwrite"):
        train_routers(config())
    train_routers(config(overwrite=True))


def test_the_last_epoch_may_be_kept(config):
    best = train_routers(config(num_epochs=6, learning_rate=0.05, run_name="best", keep="best"))
    last = train_routers(config(num_epochs=6, learning_rate=0.05, run_name="last"))
    assert last["kept_step"] == last["steps"] == last["history"][-1]["step"]
    assert best["kept_step"] == best["best_step"] == last["best_step"]
    assert best["best_step"] < best["steps"], "the toy no longer tells the two apart"
    assert last["metrics"]["routers_loss"] == pytest.approx(last["history"][-1]["eval_routers_loss"], rel=1e-5)
    assert last["metrics"]["routers_loss"] != pytest.approx(best["metrics"]["routers_loss"], rel=1e-3)


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
import train
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("limit", "named"),
    [(4_000, "features"), (60_000, "trainer"), (150_000, "trainer"), (250_000, "drllm")],
    ids=["features", "weights of an epoch", "optimizer state of an epoch", "final checkpoint"],
)
def test_a_full_disk_is_one_sentence_and_the_run_is_resumed(limit, named, tiny_labels, tmp_path):
    """In a process of its own, whose files may not grow beyond `limit` bytes."""
    arguments = ["--data", str(tiny_labels), "--num_epochs", "2", "--warmup_steps", "1"]
    if named != "features":
        arguments += ["--features_dir", str(tmp_path / "features")]
        assert train.main([*arguments, "--output_dir", str(tmp_path / "undisturbed")]) == 0
    else:
        arguments += ["--features_dir", str(tmp_path / "new")]
    out = tmp_path / "out"
    command = [sys.executable, "-c", LIMITED, str(limit), *arguments, "--output_dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: no space left to write")
    assert named in last
    assert "run the same command to resume" in last
    assert train.main([*arguments, "--output_dir", str(out)]) == 0
    if named != "features":
        ours, undisturbed = (
            load_file(tmp_path / name / "drllm" / "model.safetensors") for name in ("out", "undisturbed")
        )
        assert all(torch.equal(ours[name], tensor) for name, tensor in undisturbed.items())
        records = [
            json.loads((tmp_path / name / "drllm" / "training.json").read_text()) for name in ("out", "undisturbed")
        ]
        assert records[0]["metrics"] == records[1]["metrics"]
