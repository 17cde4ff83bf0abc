"""The authors' four lines, word for word: what each does here, and the line of docs/authors_commands.md that works."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import lm_eval
import pytest
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager

import data_generation
import train
from tests.search_toys import make_data, make_model
from tests.training_toys import make_labels

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "authors_commands.md").read_text()
SHORT = ["--num_epochs", "1", "--warmup_steps", "1"]
MODEL = "meta-llama/Llama-3.2-3B-Instruct"
TASKS = "arc_challenge,arc_easy,mmlu,aime24,truthfulqa,gsm8k,piqa"

STEP_1 = (
    "python data_generation.py --model meta-llama/Llama-3.2-3B-Instruct --dataset arc,dart --output_dir "
    "data/mcts_paths --num_simulations 50 --budget 2"
)
STEP_2 = (
    "python train.py --model_id meta-llama/Llama-3.2-3B-Instruct --run_name drllm-llama-3b --num_epochs 25 "
    "--learning_rate 1e-3 --weight_decay 0.01 --warmup_steps 500 --gradient_accumulation 16"
)
BASELINE = (
    "accelerate launch --multi_gpu --num_processes 4 lm_eval --model hf --model_args "
    'pretrained="meta-llama/Llama-3.2-3B-Instruct" --tasks arc_challenge,arc_easy,mmlu,aime24,truthfulqa,gsm8k,piqa '
    "--batch_size 1"
)
ROUTED = (
    "accelerate launch --num_processes 2 lm_eval --model hf --model_args "
    "pretrained=checkpoints/drllm-llama-3b-instruct,dtype=bfloat16,num_windows=8 --tasks "
    "arc_challenge,arc_easy,mmlu,aime24,truthfulqa,gsm8k,piqa --batch_size 1 --gen_kwargs max_new_tokens=256 "
    "--cache_requests true"
)
LINES = (STEP_1, STEP_2, BASELINE, ROUTED)


def counterpart(line: str) -> list[str]:
    """The words of the working line under an authors' line on the page: the first one with -m lm_eval."""
    lines = [found.strip() for found in PAGE[PAGE.index(line) + len(line) :].splitlines()]
    return shlex.split(
        next(found for found in lines if found.startswith("accelerate launch") and " -m lm_eval " in found)
    )


@pytest.mark.parametrize("line", LINES, ids=["step 1", "step 2", "baseline", "routed"])
def test_the_page_has_the_authors_lines(line):
    assert f"\n    {line}\n" in PAGE


@pytest.fixture(scope="module")
def authors_folder(tmp_path_factory, stock_model):
    """A folder in which steps 1 and 2 ran as the authors write them, on a toy model of the model's name."""
    folder = tmp_path_factory.mktemp("authors")
    make_model(folder / MODEL, stock_model)
    make_data(folder / "questions", 24)
    rows = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (folder / "questions").iterdir()
    }
    stems = {"ARC-Easy": "arc_easy_train", "ARC-Challenge": "arc_challenge_train", None: "dart_math_train"}
    for number, row in enumerate(rows["dart_math_train"]):
        row["query_metadata"]["level"] = 1 + number % 5

    def load(path, config=None, split=None):
        return datasets.Dataset.from_list(rows[stems[config]])

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets, "load_dataset", load)
        assert data_generation.main(shlex.split(STEP_1)[2:]) == 0
        assert train.main(shlex.split(STEP_2)[2:]) == 0
    return folder


def test_steps_1_and_2_run_as_they_are(authors_folder):
    manifest = json.loads((authors_folder / "data/mcts_paths/manifest.json").read_text())
    assert (manifest["model"], manifest["arguments"]["num_simulations"], manifest["arguments"]["budget"]) == (
        MODEL,
        50,
        2,
    )
    assert {row["set"] for row in manifest["table2"]} == {
        "arc_easy",
        "arc_challenge",
        *(f"dart-{n}" for n in range(1, 6)),
    }
    record = json.loads((authors_folder / "checkpoints/drllm-llama-3b/training.json").read_text())
    assert (record["config"]["num_epochs"], record["base_model"]["name"]) == (25, MODEL)
    assert not (authors_folder / "checkpoints/drllm-llama-3b-instruct").exists()


@pytest.mark.parametrize("line", [BASELINE, ROUTED], ids=["baseline", "routed"])
def test_step_3_takes_lm_eval_for_a_file(line, authors_folder):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *shlex.split(line)[1:]]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=authors_folder, env=environment)
    assert done.returncode == 1
    assert "can't open file" in done.stderr
    assert "/lm_eval'" in done.stderr
    assert "ends with `can't open file '.../lm_eval'`".lower() in PAGE.lower()


ARC_ROWS = [
    {
        "id": f"{n}",
        "question": f"w{n} w1",
        "choices": {"text": ["w2", "w3", "w4"], "label": ["A", "B", "C"]},
        "answerKey": key,
    }
    for n, key in enumerate("ABCA")
]


def _lm_eval(words, monkeypatch, tmp_path):
    """lm-eval's results of a working line, in this process, on the CPU, on arc_easy from rows of its schema."""
    arguments = words[words.index("lm_eval") + 1 :]
    arguments[arguments.index("--tasks") + 1] = "arc_easy"
    splits = dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(ARC_ROWS))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: datasets.DatasetDict(splits))
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "cache"))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", TaskManager)  # drllm.evaluate may have put its own there
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    monkeypatch.setattr(
        sys, "argv", ["lm_eval", *arguments, "--device", "cpu", "--output_path", str(tmp_path / "out.json")]
    )
    cli_evaluate()
    (file,) = tmp_path.glob("out*.json")
    return json.loads(file.read_text())


def test_the_working_lines_of_step_3_give_results(authors_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(authors_folder)
    words = counterpart(BASELINE)
    assert words == shlex.split(BASELINE.replace(" lm_eval ", " -m lm_eval "))
    (tmp_path / "base").mkdir()
    base = _lm_eval(words, monkeypatch, tmp_path / "base")
    assert base["n-samples"]["arc_easy"]["effective"] == len(ARC_ROWS)
    words = counterpart(ROUTED)
    changed = ROUTED.replace(" lm_eval ", " -m lm_eval ").replace("-3b-instruct,", "-3b,")
    assert words == shlex.split(changed.replace("num_windows=8", "num_windows=8,trust_remote_code=True"))
    (tmp_path / "routed").mkdir()
    routed = _lm_eval(words, monkeypatch, tmp_path / "routed")
    assert 0 <= routed["results"]["arc_easy"]["acc_norm,none"] <= 1
    assert routed["config"]["model_args"]["num_windows"] == 8


def test_a_process_that_knows_no_routers_refuses_the_folder_without_trust_remote_code(authors_folder):
    # What lm-eval's model does first; this process has registered the model type.
    code = "from transformers import AutoConfig; AutoConfig.from_pretrained('checkpoints/drllm-llama-3b')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=authors_folder, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert "trust_remote_code=True" in done.stderr


def test_the_other_tasks_are_lm_evals():
    known = TaskManager().all_tasks
    assert [name for name in TASKS.split(",") if name not in known] == []
    assert lm_eval.__version__ in PAGE


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
    arguments = [*shlex.split(STEP_2)[2:], "--num_windows", "8", "--with_squad", "--with_commonsense"]
    arguments[arguments.index("--num_epochs") + 1] = "1"
    arguments[arguments.index("--model_id") + 1] = str(tiny_base)
    assert train.main(arguments) == 0
    record = json.loads((tmp_path / "checkpoints" / "drllm-llama-3b" / "training.json").read_text())
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
