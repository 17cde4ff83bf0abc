import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import data_generation
import train
from drllm.errors import UserError
from drllm.evaluation import eval_sh
from drllm.evaluation.results import benchmarks
from experiments import paper_backbones
from experiments.backbone_costs import Yields, plan_labels

ROOT = Path(__file__).parents[2]
MINIATURE = ROOT / "miniature" / "model"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def _steps(*arguments):
    args = paper_backbones.parse_arguments([str(argument) for argument in arguments])
    (backbone,) = paper_backbones.find_backbones(args.model)
    return backbone, {step.name: step for step in paper_backbones.plan(backbone, args)}


def test_the_papers_six_models_are_known_by_short_and_by_hub_name():
    found = paper_backbones.find_backbones("all")
    assert [backbone.model for backbone in found] == [
        "meta-llama/Llama-3.2-3B-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.2-3B",
        "meta-llama/Llama-3.1-8B",
        "Qwen/Qwen2.5-3B-Instruct",
        "Qwen/Qwen2.5-7B-Instruct",
    ]
    assert paper_backbones.find_backbones("Qwen/Qwen2.5-7B-Instruct,llama-3.2-3b") == [found[5], found[2]]
    # The paper: 11.0 M for L=28, d=3072 and 16.8 M for L=32, d=4096
    assert [round(backbone.router_parameters / 1e6, 1) for backbone in found[:2]] == [11.0, 16.8]


def test_without_run_it_prints_every_command_with_its_cost(capsys):
    assert paper_backbones.main(["--model", "llama-3.2-3b-instruct"]) == 0
    printed = capsys.readouterr().out
    commands = [line for line in printed.splitlines() if line and not line.startswith("#")]
    assert len(commands) == len(paper_backbones.STEPS)
    assert "--num_processes 8 ./data_generation.py --model meta-llama/Llama-3.2-3B-Instruct" in commands[0]
    assert commands[1].startswith("python ./train.py --data out/backbones/llama-3.2-3b-instruct/labels ")
    assert "--tasks drllm_arc,drllm_dart" in commands[2]
    assert "--tasks mmlu,gsm8k,truthfulqa_mc1," in commands[3]
    assert "--tasks aime24 --output_dir" in commands[4]
    assert "--batch_size 32 " in commands[4]
    assert "humaneval" not in printed
    assert printed.count("GPU hours") == len(paper_backbones.STEPS) + 1
    assert printed.count("GB of GPU memory") == len(paper_backbones.STEPS) - 2  # tables and figures need none
    assert "2,148 of 4,000 from 10,865 visited questions, 429,241 inferences" in " ".join(printed.split("\n# "))
    assert not (ROOT / "runs" / "backbones").exists()
    assert paper_backbones.main(["--model", "llama-3.2-3b", "--unsafe_code"]) == 0
    printed = capsys.readouterr().out
    assert "hellaswag,humaneval --" in printed
    assert printed.count("--unsafe_code") == 1


def test_long_answers_get_small_batches(capsys):
    # 32 answers of 32768 tokens, the limit of lm-eval's aime24, do not fit on a GPU.
    assert paper_backbones.main(["--model", "llama-3.2-3b", "--steps", "aime24,table5", "--gen_kwargs", ""]) == 0
    aime24, table5 = [line for line in capsys.readouterr().out.splitlines() if line.startswith("./eval.sh")]
    assert "--batch_size 4 " in aime24
    assert "--batch_size 32 " in table5
    assert "--gen_kwargs" not in aime24 + table5


# The paper's settings, by step and argument of the command. Sections are the paper's.
PAPER = {
    "labels": {
        "dataset": "arc,dart",  # 4
        "samples": "paper",  # Table 2: 4,000 labels
        "num_simulations": 50,  # 4
        "budget": 2.0,  # 4: at most 2L blocks
        "c": 1.8,  # 4
        "length_penalty": 3.0,  # 4
        "p_rand": 0.1,  # 4
        "wrong_to_right_share": 0.3,  # 4: about 30%
        "max_new_tokens": "dart=20",  # the smallest limit that all rows of Table 3 allow
        "strict_letters": False,
        "chat_template": "auto",
        "reward": "generation",
        "limit": None,
    },
    "train": {
        "num_epochs": 25,  # 5
        "warmup_steps": 500,  # 5
        "learning_rate": 1e-3,  # 5
        "weight_decay": 0.01,  # 5
        "gradient_accumulation": 16,  # 5: the effective batch
        "gamma": 2.0,  # 3.2
        "beta": "auto",  # 3.2: 0.999 at the paper's number of labels
        "loss": "focal",  # 3.2
        "num_windows": 8,  # 3.1
        "router_width": 128,  # 5
        "router_depth": 2,  # 3.1: Linear-GELU-Linear
        "teacher_forcing": True,  # 3.2
    },
    "in_domain": {"tasks": "drllm_arc,drllm_dart", "gen_kwargs": None, "dart_max_new_tokens": None},
    "table4": {
        "tasks": "mmlu,gsm8k,truthfulqa_mc1,gpqa_diamond_zeroshot,agieval,squadv2,piqa",
        "gen_kwargs": "max_new_tokens=2048",  # 5
    },
    "aime24": {"tasks": "aime24", "gen_kwargs": "max_new_tokens=2048"},
    "table5": {"tasks": "hellaswag,humaneval", "gen_kwargs": "max_new_tokens=2048", "unsafe_code": True},
}
# Out of domain, lm-eval's defaults: no chat template, the tasks' own shots, all questions, p = -0.5.
EVALUATION = {"chat_template": "auto", "num_fewshot": None, "limit": None, "model_args": ""}


def _parse(step, command):
    """The arguments of a step's command as its own program reads them, defaults included."""
    program = next(n for n, part in enumerate(command) if part.startswith("./"))
    parse = {"labels": data_generation.parse_arguments, "train": train.parser().parse_args}
    return vars(parse.get(step, eval_sh.parse_arguments)(command[program + 1 :]))


@pytest.mark.parametrize("name", ["llama-3.2-3b-instruct", "llama-3.1-8b", "qwen2.5-7b-instruct"])
def test_printed_commands_have_the_papers_settings(name, capsys):
    assert paper_backbones.main(["--model", name, "--unsafe_code"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("#")]
    commands = dict(zip(paper_backbones.STEPS, map(shlex.split, lines), strict=True))
    assert {step for step in commands if commands[step][:3] == ["python", "-m", "experiments.ablations"]} == {
        "table6",
        "figure5",
        "figure7",
        "figure8",
    }
    table = PAPER | {step: PAPER[step] | EVALUATION for step in paper_backbones.EVALUATIONS}
    # Appendix A: the responses of base models begin with a box; their prompts have no template.
    is_base = "instruct" not in name
    table["labels"] = table["labels"] | {"inject_boxed": is_base, "chat_template": "off" if is_base else "auto"}
    for step, settings in table.items():
        parsed = _parse(step, commands[step])
        assert {key: parsed[key] for key in settings} == settings, step
    checkpoint = f"out/backbones/{name}/checkpoints/{name}"
    assert all(_parse(step, commands[step])["checkpoint"] == [checkpoint] for step in paper_backbones.EVALUATIONS)


@pytest.mark.parametrize("is_base", [True, False])
def test_other_models_are_base_models_where_an_argument_says_so(is_base, monkeypatch):
    flag = ["--base_model"] if is_base else []
    config = paper_backbones.load_config(MINIATURE)
    monkeypatch.setattr(paper_backbones, "load_config", lambda name: config)
    for name in (str(MINIATURE), "org/On-The-Hub"):
        args = paper_backbones.parse_arguments(["--model", name, *flag])
        (backbone,) = paper_backbones.find_backbones(args.model, args.base_model)
        assert (backbone.model, backbone.is_base) == (name, is_base)
        parsed = _parse("labels", {step.name: step for step in paper_backbones.plan(backbone, args)}["labels"].command)
        assert (parsed["inject_boxed"], parsed["chat_template"]) == ((True, "off") if is_base else (False, "auto"))


def test_estimates_follow_from_sizes_and_assumptions():
    assumed = "card=a100-80gb,pass_ms=0,mfu="
    backbone, steps = _steps("--model", "llama-3.2-3b", "--assume", f"{assumed}0.5", "--gpus", 1)
    # Search: prompts are bound by products, decoding by reading the weights.
    batches = 10865 * 961000 / 24330 / 128
    prompts = batches * 2 * 3.21e9 * 128 * 130 / 156e12
    decoding = batches * (0.25 * 10 + 0.75 * 20 - 1) * 2 * 3.21e9 / 1.0195e12
    assert steps["labels"].gpu_hours == pytest.approx((prompts + decoding + 120) / 3600, rel=1e-3)
    features, weights = 28 * 8 * 3072 * 2, 2 * 3.21e9
    assert steps["train"].disk == pytest.approx(2148 * features + weights + 4 * backbone.router_parameters)
    # The search: weights, 128 rows of 150 tokens (cache, activations, logits), states of 384 questions.
    a_token = 28 * 2 * 1024 * 2 + (2 * 8192 + 4 * 3072) * 2
    states = 28 * 130 * (3072 + 2 * 1024) * 2
    memory = weights + 128 * (150 * a_token + 128256 * 6) + 384 * states
    assert steps["labels"].memory == pytest.approx(memory)
    _, slow = _steps("--model", "llama-3.2-3b", "--assume", f"{assumed}0.25", "--gpus", 1)
    assert slow["table4"].gpu_hours > 1.9 * steps["table4"].gpu_hours - 240 / 3600
    _, few = _steps("--model", "llama-3.2-3b", "--samples", 2, "--limit", 5)
    assert few["labels"].gpu_hours < steps["labels"].gpu_hours
    # Of five questions a set gives few labels or none: 2 of ARC-C, 1 of DART-1 at best.
    assert few["train"].disk < features * 14 + weights + 4 * backbone.router_parameters


def test_labels_are_those_that_the_pool_can_give(tiny_labels, tmp_path):
    paper = Yields.of(None)
    assert paper.labels["arc_challenge"] == 600 / 1119
    assert paper.inferences == pytest.approx(961000 / 24330 / 50, rel=1e-3)
    plans = plan_labels(paper, None, None)
    assert sum(part.questions for part in plans.values()) == 10865
    assert sum(part.questions for name, part in plans.items() if name.startswith("dart")) == 7495
    dart = plans["dart-5"]
    assert (dart.visited, dart.wanted, dart.labels) == (2301, 1000, 280)  # 2301 * 1000 / 8203
    # What a search needs is less than everything where labels are frequent, and what one set lacks others give.
    half = dict.fromkeys(plans, 0.5) | {"arc_easy": 0.01}
    plans = plan_labels(Yields("", half, 1.0), 100, None)
    assert (plans["arc_easy"].labels, plans["arc_easy"].visited) == (22, 2251)
    assert sum(part.labels for part in plans.values()) == 700
    assert plans["dart-1"].visited == 2 * plans["dart-1"].labels

    manifest = json.loads((tiny_labels / "manifest.json").read_text())
    rows = [{"set": name, "sampled": 3, "visited": 10, "inferences": 200} for name in plans]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"table2": rows}))
    measured = Yields.of(tmp_path)
    assert measured.labels == dict.fromkeys(plans, 0.3)
    assert measured.inferences == 20 / 50
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"table2": rows[:3]}))
    with pytest.raises(UserError, match="no searched question of dart-2, dart-3"):
        Yields.of(tmp_path)


def test_the_test_questions_of_dart_are_those_of_math():
    sizes = [task["size"][0] for task in benchmarks() if task["task"].startswith("drllm_dart")]
    assert sizes == [437, 894, 1131, 1214, 1324]  # docs/reproduction_notes.md


@pytest.mark.parametrize("name", ["llama-3.2-3b-instruct", "llama-3.1-8b-instruct"])
def test_docs_have_the_programs_estimates(name):
    _, steps = _steps("--model", name, "--gpus", 1)
    total = sum(step.gpu_hours for step in steps.values())
    row = [
        f"{steps['labels'].gpu_hours:.1f} h",
        f"{steps['train'].gpu_hours:.1f} h",
        f"{steps['in_domain'].gpu_hours:.1f} h",
        f"{total:.0f} h",
        f"{steps['labels'].memory / 1e9:.0f} GB",
        f"{max(step.memory for step in steps.values()) / 1e9:.0f} GB",
        f"{sum(step.disk for step in steps.values()) / 1e9:.0f} GB",
    ]
    assert f"| `{name}` | {' | '.join(row)} |" in (ROOT / "docs" / "clusters.md").read_text()


def test_a_folder_is_a_backbone_too():
    backbone, steps = _steps("--model", MINIATURE, "--data_dir", "miniature/data", "--gpus", 0, "--limit", 4)
    assert (backbone.name, backbone.blocks, backbone.hidden_size) == ("model", 10, 128)
    assert 1.5e6 < backbone.parameters < 3e6
    assert steps["labels"].command[:3] == ["python", "./data_generation.py", "--model"]
    assert "--limit 4" in " ".join(steps["in_domain"].command)
    assert "--device cpu" in " ".join(steps["in_domain"].command)


def test_the_first_failing_step_ends_the_run_with_one_sentence(tmp_path, capfd):
    arguments = ["--model", str(MINIATURE), "--gpus", "0", "--output_dir", str(tmp_path), "--steps", "train,tables"]
    assert paper_backbones.main([*arguments, "--run"]) == 2  # no labels
    captured = capfd.readouterr()
    assert captured.err.splitlines()[-1] == (
        "error: model: step train ended with exit status 2; run the same command to resume"
    )
    assert "step 2 of 2" not in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-2"], "--model gpt-2 is neither a folder with a model nor one of llama-3.2-3b-instruct"),
        (["--model", "all", "--steps", "train,fly"], "--steps fly: choose from labels, train"),
        (["--model", "all", "--assume", "mfu=0"], "--assume mfu=0: mfu must lie in (0, 1]"),
        (["--model", "all", "--assume", "mfu=x"], "--assume mfu=x: mfu and pass_ms must be numbers"),
        (["--model", "all", "--assume", "gpu=x"], "--assume gpu: choose from card, mfu, pass_ms"),
        (["--model", "all", "--assume", "card=t4"], "--assume card=t4: choose from a100-40gb"),
        (["--model", "all", "--yields", "none"], "none/manifest.json does not exist"),
        (["--model", "llama-3.2-3b", "--gpus", "99", "--run"], "GPUs: pass --gpus"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message, capsys):
    assert paper_backbones.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_slurm_script_runs_one_backbone_per_task(tmp_path, capsys):
    assert paper_backbones.main(["--slurm", "--model", "all", "--gpus", "4", "--num_epochs", "7"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-5\n" in script
    assert "#SBATCH --gpus-per-node=a100:4\n" in script
    (tmp_path / "array.sbatch").write_text(script)
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "5"}
    script = ["bash", str(tmp_path / "array.sbatch")]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=True)
    options = "--model Qwen/Qwen2.5-7B-Instruct --run --gpus 4 --num_epochs 7"
    assert done.stdout == f"-m experiments.paper_backbones {options}\n"


@pytest.mark.slow
def test_the_whole_pipeline_on_the_miniature_and_again_nothing(tmp_path):
    command = [sys.executable, "-m", "experiments.paper_backbones", "--model", str(MINIATURE)]
    command += ["--data_dir", "miniature/data"]
    command += ["--samples", "1", "--limit", "4", "--num_simulations", "10", "--num_epochs", "1"]
    command += ["--gpus", "0", "--run"]
    command += ["--steps", "labels,train,in_domain,tables", "--output_dir", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "model"
    assert (folder / "labels" / "manifest.json").is_file()
    queries = (folder / "results" / "in_domain" / "router" / "queries.jsonl").read_text().splitlines()
    assert len(queries) == 7 * 4
    table = (folder / "tables" / "table3.md").read_text()
    assert any("results/in_domain" in line and "not run" not in line for line in table.splitlines())
    record = (folder / "results" / "in_domain" / "router" / "run.json").read_text()
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "is trained already" in again.stdout
    assert "router: complete, kept" in again.stdout
    assert (folder / "results" / "in_domain" / "router" / "run.json").read_text() == record
    assert json.loads(record)["run"]["limit"] == 4
