"""The routed LLM in another folder and without this repository: plain transformers and plain lm-eval."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from drllm.checkpoints import load_routed_checkpoint, load_tokenizer
from tests.eval_toys import evaluate, routed_lm
from tests.llm.steps import lines

pytestmark = pytest.mark.llm

WITHOUT_THE_REPOSITORY = """
import importlib.util
assert not any(importlib.util.find_spec(name) for name in ("drllm", "train_models", "data_models"))
"""
GENERATE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
encoded = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
print(json.dumps([model.generate(**each, max_new_tokens=12, do_sample=False)[0].tolist() for each in encoded]))
"""
LM_EVAL = """
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder outside of the repository: working directory and caches of the processes."""
    folder = tmp_path_factory.mktemp("outside")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def moved(trained, outside) -> Iterator[Path]:
    """`trained` in another folder; there is nothing where it was written."""
    yield trained.rename(outside / "moved")
    (outside / "moved").rename(trained)


def run_outside(code: str, outside: Path, *arguments: str) -> str:
    """Runs Python code there; returns what it printed on stdout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(outside / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_THE_REPOSITORY + code, *arguments]
    done = subprocess.run(command, cwd=outside, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_generate_answers_with_the_same_tokens(steps, labels, moved, outside):
    model, tokenizer = load_routed_checkpoint(moved, device="cpu"), load_tokenizer(moved)
    prompts = [json.loads(line)["prompt"] for line in lines(labels)]
    prompts += [tokenizer.apply_chat_template([{"role": "user", "content": "Name a colour."}], tokenize=False)]
    encoded = [tokenizer(prompt, return_tensors="pt") for prompt in prompts]
    expected = [model.generate(**each, max_new_tokens=12, do_sample=False)[0].tolist() for each in encoded]
    with torch.no_grad():
        paths = {tuple(model(**each).paths[0].tolist()) for each in encoded}
    assert len(paths) > 1, "the routers decide by prompt"
    printed = run_outside(GENERATE, outside, str(moved), json.dumps(prompts))
    assert json.loads(printed.splitlines()[-1]) == expected


def test_lm_eval_reports_the_accuracy_of_the_model_type_drllm(steps, moved, outside):
    """Options of one token: plain `hf` passes longer ones to the routers as part of the prompt."""
    options = f"--model hf --model_args pretrained={moved},trust_remote_code=True --tasks toy_label --batch_size 1"
    options += f" --include_path {steps.data} --device cpu --output_path {outside / 'results'} --log_samples"
    run_outside(LM_EVAL, outside, "run", *options.split())
    (path,) = outside.glob("results/**/results_*.json")
    (samples,) = outside.glob("results/**/samples_toy_label_*.jsonl")
    theirs = {row["doc_id"]: row for row in map(json.loads, samples.read_text().splitlines())}
    ours = evaluate(routed_lm(moved), steps.data, ["toy_label"])
    assert json.loads(path.read_text())["results"]["toy_label"]["acc,none"] == ours["results"]["toy_label"]["acc,none"]
    assert len(theirs) == len(ours["samples"]["toy_label"]) == 8
    for sample in ours["samples"]["toy_label"]:
        scores = [float(response[0][0]) for response in theirs[sample["doc_id"]]["resps"]]
        assert scores == pytest.approx([response[0][0] for response in sample["resps"]], abs=1e-4)
    shares = ours["config"]["block_applications"]["toy_label"]["share"]
    assert shares["execute"] < 1, "the routers change paths"
