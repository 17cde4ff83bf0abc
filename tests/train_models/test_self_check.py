"""Under a release of transformers that nobody has tested, a model checks its code before it answers."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.models.llama import modeling_llama

from data_models import load_path_model
from train_models import retrofit, self_check
from train_models.cache import CACHE_NAME
from train_models.following import MASK_FACTORIES

SENTENCE = r"does not work with transformers 5\.99\.0 .*{}.*; run pip install 'transformers>=5\.4,<5\.25'$"


def renamed_in_the_blocks(monkeypatch):
    """A block takes its cache as `kv` and whatever else it is given as options of the attention."""
    forward = modeling_llama.LlamaDecoderLayer.forward

    def renamed(self, hidden_states, kv=None, **options):
        return forward(self, hidden_states, **options | {CACHE_NAME: kv})

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", renamed)


def mask_renamed_in_the_blocks(monkeypatch):
    """A block takes its mask under another name, which the stock model knows: without it ours reads the padding."""
    block_forward, stock_forward = modeling_llama.LlamaDecoderLayer.forward, modeling_llama.LlamaModel.forward
    is_stock = []

    def of_the_stock_model(self, *args, **kwargs):
        is_stock.append(True)
        try:
            return stock_forward(self, *args, **kwargs)
        finally:
            is_stock.clear()

    def renamed(self, hidden_states, attention_mask=None, **options):
        return block_forward(self, hidden_states, attention_mask=attention_mask if is_stock else None, **options)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", of_the_stock_model)
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", renamed)


def renamed_in_generate(monkeypatch):
    """`generate` passes the cache as `kv`."""
    prepare = GenerationMixin.prepare_inputs_for_generation

    def renamed(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        inputs["kv"] = inputs.pop(CACHE_NAME, None)
        return inputs

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", renamed)


def renamed_in_the_masks(monkeypatch):
    """The functions that make masks take the cache as `kv`."""

    def renamed(config, inputs_embeds, attention_mask, kv=None, position_ids=None):
        raise AssertionError

    monkeypatch.setitem(MASK_FACTORIES, "full_attention", renamed)


BREAKS = {
    renamed_in_the_blocks: "RuntimeError",  # with two prompts of different lengths; with one, wrong tokens
    mask_renamed_in_the_blocks: "cached decoding along the base model's path is wrong",
    renamed_in_generate: "cached decoding along the base model's path",
    renamed_in_the_masks: "TypeError",
}


@pytest.fixture
def unknown_release(monkeypatch):
    """Counts the checks, which start anew."""
    checks = []
    check = self_check._failure
    monkeypatch.setattr(self_check, "_failure", lambda *args: checks.append(args) or check(*args))
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    self_check._check_once.cache_clear()
    yield checks
    self_check._check_once.cache_clear()


def random_states() -> list:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


def test_nothing_is_checked_under_a_tested_release(decisive, tmp_path, monkeypatch):
    monkeypatch.setattr(self_check, "_check_once", lambda *_: pytest.fail("checked"))
    decisive().save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_once_for_each_family_and_back_end(family, decisive, unknown_release, tmp_path):
    model = decisive(family)
    assert len(unknown_release) == 1
    model.save_pretrained(tmp_path)
    before = random_states()
    for auto_class in (AutoModelForCausalLM, AutoModel):
        auto_class.from_pretrained(tmp_path)
        auto_class.from_config(AutoConfig.from_pretrained(tmp_path))
    assert len(unknown_release) == 1
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))  # `from_config` draws weights
    for change in ("eager", "sdpa", "eager"):
        model.set_attn_implementation(change)
    assert [implementation for _, implementation in unknown_release] == ["sdpa", "eager"]
    assert random_states() == before
    load_path_model(model.config.base_model_name)
    assert len(unknown_release) == 3, "the models of the search have their own class"


def test_the_contexts_in_which_models_are_loaded_change_nothing(decisive, unknown_release, tmp_path):
    decisive().save_pretrained(tmp_path)
    for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        self_check._check_once.cache_clear()
        with context:
            AutoModelForCausalLM.from_pretrained(tmp_path)
    self_check._check_once.cache_clear()
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).device.type == "meta"
    torch.set_default_dtype(torch.bfloat16)
    try:
        self_check._check_once.cache_clear()
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        self_check._check_once.cache_clear()
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}, attn_implementation="eager")
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(unknown_release) == 6


@pytest.mark.parametrize("break_it", BREAKS)
def test_a_release_that_renames_an_argument_is_refused(break_it, stock_checkpoint, unknown_release, monkeypatch):
    folder = stock_checkpoint("llama")
    break_it(monkeypatch)
    for load in (retrofit, load_path_model):
        for _ in range(2):
            with pytest.raises(ImportError, match=SENTENCE.format(BREAKS[break_it])):
                load(folder)


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_checkpoint_that_brings_its_code_checks_itself(is_broken, decisive, tmp_path):
    decisive().save_pretrained(tmp_path / "checkpoint")
    code = f"""
import sys, transformers
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
for module in (transformers, sys.modules["transformers"]):  # it replaces itself
    module.__version__ = "5.99.0"
forward = modeling_llama.LlamaDecoderLayer.forward

def renamed(self, hidden_states, kv=None, **options):
    return forward(self, hidden_states, **options | {{"{CACHE_NAME}": kv}})

if {is_broken}:
    modeling_llama.LlamaDecoderLayer.forward = renamed
model = AutoModelForCausalLM.from_pretrained("checkpoint", trust_remote_code=True)
assert "train_models" not in sys.modules
print("loaded")
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": ""}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    if is_broken:
        assert run.returncode == 1
        assert run.stderr.splitlines()[-1].startswith("ImportError: the code of RoutedLlamaForCausalLM does not work")
    else:
        assert run.stdout.endswith("loaded\n"), run.stderr[-2000:]
        assert "checks at loading" in run.stderr
