"""Options at the edge of the window, and models in other libraries' wrappers, as lm-eval's own `hf` takes them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from transformers import LlamaForCausalLM

from drllm.errors import UserError
from drllm.provenance import fingerprint
from tests.eval_toys import routed_lm, stock_lm

WINDOW = 12


def scores(lm, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Log-likelihoods of (context, option), in tokens."""
    lm._max_length = WINDOW
    if hasattr(lm, "_cache"):
        lm._cache.pending.clear()
    requests = [(("context", " option"), list(context), list(option)) for context, option in rows]
    return lm._loglikelihood_tokens(requests, disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_options_as_long_as_the_window_are_those_of_hf(batch_size, base):
    rows = [([5, 6, 7], [8] * length) for length in (WINDOW - 1, WINDOW, 1, 2)] + [([5] * 30, [9, 10])]
    expected = scores(stock_lm(base, batch_size), rows)
    actual = scores(routed_lm(base, batch_size), rows)
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    assert [score for score, _ in actual] == pytest.approx([score for score, _ in expected], abs=2e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_longer_option_is_refused_at_each_batch_size(batch_size, base, routed):
    rows = [([5, 6, 7], [8]), ([5, 6, 7], [8] * (WINDOW + 1))]
    with pytest.raises(AssertionError):
        scores(stock_lm(base, batch_size), rows)
    for checkpoint in (base, routed):
        with pytest.raises(UserError, match=f"' option' has {WINDOW + 1} tokens, but the model reads at most {WINDOW}"):
            scores(routed_lm(checkpoint, batch_size), rows)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_an_empty_option_has_the_answer_of_hf_at_each_batch_size(batch_size, base, routed):
    rows = [([5, 6, 7], []), ([5, 6, 7], [8]), ([9, 10], [11, 12])]
    assert scores(stock_lm(base, batch_size), rows)[0] == (0.0, True)
    for checkpoint in (base, routed):
        lm = routed_lm(checkpoint, batch_size)
        assert scores(lm, rows)[0] == (0.0, True)
        alone = [([5, 6, 7], []), ([9, 10], [11, 12])]
        with pytest.raises(AssertionError):
            scores(stock_lm(base, batch_size), alone)
        with pytest.raises(UserError, match="an option after 'context' has no tokens"):
            scores(lm, alone)


def answers(lm) -> list:
    requests = [
        Instance("loglikelihood", {}, ("w1 w2 w3", option), 0, metadata=("toy", number, 1))
        for number, option in enumerate([" A", " w4 w5"])
    ]
    until = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    generated = lm.generate_until([Instance("generate_until", {}, ("w1 w2", until), 0, metadata=("toy", 0, 1))])
    return [score for score, _ in lm.loglikelihood(requests)] + generated


def test_offloaded_weights_are_read_as_others_are(routed, tmp_path):
    whole = routed_lm(routed)
    limits = {"parallelize": True, "max_cpu_memory": "60KB", "offload_folder": str(tmp_path)}
    offloaded = routed_lm(routed, **limits)
    assert any(parameter.is_meta for parameter in offloaded.model.parameters()), "nothing was offloaded"
    assert fingerprint(offloaded.model) == fingerprint(whole.model)
    expected, actual = answers(whole), answers(offloaded)
    assert actual[-1] == expected[-1]
    assert actual[:2] == pytest.approx(expected[:2], abs=2e-4)
    assert offloaded.get_model_info()["routing"] == whole.get_model_info()["routing"]


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_fingerprint_does_not_depend_on_offloading(is_tied, stock_checkpoint, tmp_path):
    base = stock_checkpoint("llama", tie_word_embeddings=is_tied)
    place = {"model.layers": "disk", "model.embed_tokens": "disk", "model.norm": "cpu", "lm_head": "disk"}
    place |= {"model.rotary_emb": "cpu"}
    models = [
        LlamaForCausalLM.from_pretrained(base, device_map=place, offload_folder=tmp_path) if offload else
        LlamaForCausalLM.from_pretrained(base)
        for offload in (False, True)
    ]  # fmt: skip
    assert [any(p.is_meta for p in model.parameters()) for model in models] == [False, True]
    assert fingerprint(models[0]) == fingerprint(models[1])


@pytest.mark.slow
def test_an_adapter_on_a_routed_checkpoint(routed, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(tmp_path / "peft"), "peft==0.21.2"], check=True)
    program = f"""
import json, sys
sys.path[:0] = [{str(tmp_path / "peft")!r}, {str(Path(__file__).parents[3])!r}]
import torch
from peft import LoraConfig, get_peft_model
from tests.drllm.evaluation.test_lm_eval_options import answers
from tests.eval_toys import routed_lm
from train_models import RoutedLlamaForCausalLM
torch.set_num_threads(1)
checkpoint, folder = {str(routed)!r}, {str(tmp_path / "adapter")!r}
model = RoutedLlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))
adapted.save_pretrained(folder)
plain, with_adapter = routed_lm(checkpoint), routed_lm(checkpoint, peft=folder)
assert plain._identity({{}}) != with_adapter._identity({{}})
with_adapter.get_model_info()
print(json.dumps([answers(plain), answers(with_adapter)]))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    plain, adapted = json.loads(run.stdout.splitlines()[-1])
    assert plain[:2] != adapted[:2]
