"""Each row of docs/authors_commands.md."""

import json
import re
import shlex
from pathlib import Path

import pytest
from lm_eval.models.huggingface import HFLM

import data_generation
import train
from tests.training_toys import make_labels

ROOT = Path(__file__).parents[1]
SHORT = ["--num_epochs", "1", "--warmup_steps", "1"]


def commands() -> list[list[str]]:
    """The words of every command in the left column of the table."""
    rows = [
        line.split("|")[1] for line in (ROOT / "docs" / "authors_commands.md").read_text().splitlines() if "|" in line
    ]
    quoted = [re.search("`(.*)`", row) for row in rows[2:]]
    return [shlex.split(match[1]) for match in quoted if match and len(match[1].split()) > 1]


def command(program: str) -> list[str]:
    """The arguments of the longest command of `program`."""
    return max((words[words.index(program) + 1 :] for words in commands() if program in words), key=len)


def test_step_1_is_understood():
    args = data_generation.parse_arguments(command("data_generation.py"))
    assert (args.model, args.dataset) == ("meta-llama/Llama-3.2-3B-Instruct", "arc,dart")
    assert (args.num_simulations, args.output_dir) == (50, "data/mcts_paths")


@pytest.mark.parametrize("folder", ["data/mcts_paths", "data"])
def test_step_2_finds_the_labels_of_step_1(folder, tiny_base, tmp_path, monkeypatch, capsys):
    make_labels(tmp_path / folder, tiny_base, questions=8)
    monkeypatch.chdir(tmp_path)
    assert train.main(SHORT) == 0
    assert f"labels: reading {folder}" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "drllm" / "training.json").exists()


def test_step_2_without_labels_says_where_they_may_be(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([]) == 2
    assert capsys.readouterr().err == (
        "error: no labels in data/mcts_paths or data: make them with data_generation.py, or pass their folder with "
        "--data\n"
    )
    for folder in ("data/mcts_paths", "data"):
        make_labels(tmp_path / folder, tiny_base, questions=2)
    assert train.main([]) == 2
    assert "data/mcts_paths and data both hold labels; pass one of them with --data" in capsys.readouterr().err


def test_step_2_with_all_arguments(tiny_base, tmp_path, monkeypatch):
    make_labels(
        tmp_path / "data" / "mcts_paths", tiny_base, questions=12, sets=("arc_easy", "dart-1", "squadv2", "commonsense")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    arguments = command("train.py")
    arguments[arguments.index("--num_epochs") + 1] = "1"
    arguments[arguments.index("--report_to") + 1] = "none"  # wandb asks for an account
    assert train.main(arguments) == 0
    record = json.loads((tmp_path / "checkpoints" / "drllm" / "training.json").read_text())
    assert record["questions_per_set"] == {"arc_easy": 3, "dart-1": 3, "squadv2": 3, "commonsense": 3}


@pytest.mark.parametrize("form", ["folder", "jsonl", "json"])
def test_labels_of_three_fields(form, tiny_base, tiny_labels, tmp_path, capsys):
    rows = [json.loads(line) for line in (tiny_labels / "labels.jsonl").read_text().splitlines()]
    rows = [{name: row[name] for name in ("question", "optimal_layer_config", "answer")} for row in rows]
    source = tmp_path / ("paths.json" if form == "json" else "paths.jsonl")
    source.write_text(json.dumps(rows) if form == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--data", str(tmp_path if form == "folder" else source), "--output_dir", str(tmp_path / "out"), *SHORT]
    assert train.main(arguments) == 2
    assert "have no manifest.json, which would say what model they were made with; name it with --model_id" in (
        capsys.readouterr().err
    )
    assert train.main([*arguments, "--model_id", str(tiny_base)]) == 0
    out = capsys.readouterr().out
    assert f"labels: no manifest.json; assumed: they were made with {tiny_base} in float32, and a question is" in out
    assert "labels: 24 paths of 24 questions" in out
    checkpoint = tmp_path / "out" / "drllm"
    assert json.loads((checkpoint / "labels_manifest.json").read_text())["chat_template"] is False
    # The questions of these labels are their prompts, so training ends with the routers of the full labels.
    assert (
        train.main(["--data", str(tiny_labels), "--output_dir", str(tmp_path / "full"), "--eval_fraction", "0", *SHORT])
        == 0
    )
    assert train.main([*arguments, "--model_id", str(tiny_base), "--eval_fraction", "0", "--run_name", "all"]) == 0
    ours, full = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("out/all", "full/drllm"))
    assert ours["class_counts"] == full["class_counts"]
    assert train.main([*arguments, "--model_id", str(tiny_base)]) == 0
    assert "is already trained" in capsys.readouterr().out


def test_step_3_says_what_to_add(tiny_base, tiny_labels, tmp_path):
    assert train.main(["--data", str(tiny_labels), "--output_dir", str(tmp_path), *SHORT]) == 0
    checkpoint = str(tmp_path / "drllm")
    (line,) = (words for words in commands() if words[0] == "lm_eval")
    model_args = dict(pair.split("=") for pair in line[line.index("--model_args") + 1].split(","))
    assert model_args.keys() == {"pretrained", "dtype", "num_windows"}
    options = {"dtype": "float32", "num_windows": 8, "device": "cpu"}
    lm = HFLM(checkpoint, trust_remote_code=True, **options)
    assert lm.config.num_windows == 8
    assert hasattr(lm.model.model, "routers")


def test_metrics_are_logged_at_every_step(tiny_labels, tmp_path):
    arguments = ["--data", str(tiny_labels), "--output_dir", str(tmp_path), "--num_epochs", "3", "--warmup_steps", "1"]
    assert train.main([*arguments, "--gradient_accumulation", "8"]) == 0
    record = json.loads((tmp_path / "drllm" / "training.json").read_text())
    log = [json.loads(line) for line in (tmp_path / "drllm" / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, record["steps"] + 1))
    names = {"macro_f1", "avg_layers", "routers_loss"} | {
        f"{kind}_{action}" for kind in ("acc", "f1") for action in ("skip", "execute", "repeat")
    }
    for entry in log:
        assert names | {"loss", "learning_rate"} <= entry.keys()
        assert entry["routers_loss"] == entry["loss"]
    # Curves over training, for the figures: one point per epoch.
    assert len(record["history"]) == 3
    assert all({f"eval_{name}" for name in names} <= entry.keys() for entry in record["history"])
