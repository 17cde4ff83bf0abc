"""The benchmark of a training run at a shape: what it makes is what train.py reads, and its figures are complete."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks import training_memory
from benchmarks.random_base import random_text, write_random_base


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_random_base_loads_whole_and_a_word_is_a_token(is_tied, tmp_path):
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=is_tied, **sizes)
    written = write_random_base(tmp_path, config, torch.bfloat16)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert written == sum(parameter.nbytes for parameter in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    assert model.model.norm.weight.float().mean() > 0.9
    tokens = AutoTokenizer.from_pretrained(tmp_path)(random_text(random.Random(0), 31)).input_ids
    assert len(tokens) == 31
    assert 3 <= min(tokens) <= max(tokens) < 103


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--random_features"]])
def test_a_run_reports_pass_and_epochs(options, tmp_path):
    output = tmp_path / "result.json"
    command = ["--shape", "small", "--dtype", "float32", "--questions", "8", "--epochs", "2"]
    assert not training_memory.main([*command, "--scratch", str(tmp_path), "--output", str(output), *options])
    result = json.loads(output.read_text())
    assert (result["pass_forward_passes"] > 0) == (not options), "random features take the place of the pass"
    assert result["epochs"] == 2
    assert 0 < result["epochs_seconds"] < result["seconds_from_load_to_checkpoint"]
    assert result["peak_own_bytes"] < result["peak_resident_bytes"]
    assert result["feature_bytes"] > 8 * 12 * 8 * 256 * 4, "windows of 8 prompts, 12 routers, 8 windows, width 256"
    assert list(tmp_path.iterdir()) == [output], "the scratch folder is emptied"
