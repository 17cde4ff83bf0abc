"""Quantised bases, offloaded weights, several devices: what a CPU can show of them.

bitsandbytes quantises and multiplies on a CPU, so its 4 and 8 bit run here as they are. Disk offloading runs as it is.
Several devices are pretended, see `two_devices.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from train_models import retrofit
from train_models.paths import path_to_layer_indices

NUM_BLOCKS = 6
QUANTISED = {
    "8 bit": {"load_in_8bit": True},
    "4 bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}


def prompts(count: int) -> torch.Tensor:
    return torch.randint(2, 61, (count, 19), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", QUANTISED)
def test_a_quantised_base_has_whole_routers(bits, decisive, tmp_path):
    quantised = {"quantization_config": BitsAndBytesConfig(**QUANTISED[bits]), "dtype": torch.bfloat16}
    model = decisive("llama", {"hidden_size": 64}, device_map="cpu", **quantised)
    assert all(type(layer.mlp.up_proj) is not torch.nn.Linear for layer in model.model.layers)
    assert type(model.lm_head) is torch.nn.Linear
    for router in model.model.routers:
        assert {type(layer) for layer in router.layers} == {torch.nn.Linear, torch.nn.GELU}
        assert router.layers[0].weight.dtype == torch.bfloat16

    input_ids = prompts(4)
    output = model(input_ids)
    assert len({tuple(path) for path in output.paths.tolist()}) > 1
    arguments = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 5, "do_sample": False}
    tokens = model.generate(input_ids, **arguments)
    layer_indices = [path_to_layer_indices(path) for path in output.paths.tolist()]
    assert torch.equal(model.generate(input_ids, layer_indices=layer_indices, **arguments), tokens)

    forced = model(input_ids, layer_indices=[0, 1, 3, 3, 5], output_router_logits=True)
    forced.router_logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.routers.parameters())

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, device_map="cpu", dtype="auto")
    assert type(again.model.layers[0].mlp.up_proj) is type(model.model.layers[0].mlp.up_proj)
    for ours, loaded in zip(model.model.routers.parameters(), again.model.routers.parameters(), strict=True):
        assert torch.equal(ours, loaded)
    assert torch.equal(again(input_ids).paths, output.paths)


def test_routers_quantise_only_where_the_base_does(decisive):
    assert "model.routers" not in decisive()._keep_in_fp32_modules, "a half-precision model keeps half routers"


def test_blocks_and_routers_on_disk_decide_and_decode_alike(decisive, tmp_path):
    model = decisive()
    model.save_pretrained(tmp_path / "routed")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for block in range(NUM_BLOCKS):
        device_map[f"model.layers.{block}"] = "disk" if block % 2 else "cpu"
        device_map[f"model.routers.{block}"] = "disk" if block > 2 else "cpu"
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "routed", trust_remote_code=True, device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta
    assert offloaded.model.routers[3].layers[0].weight.is_meta
    input_ids = prompts(4)
    expected, output = model(input_ids, output_router_logits=True), offloaded(input_ids, output_router_logits=True)
    assert len({tuple(path) for path in expected.paths.tolist()}) > 1
    assert torch.equal(output.paths, expected.paths)
    torch.testing.assert_close(output.router_logits, expected.router_logits)
    arguments = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(offloaded.generate(input_ids, **arguments), model.generate(input_ids, **arguments))
    with pytest.raises(ValueError, match="the routers are offloaded"):
        offloaded.model.init_routers(seed=0)


def test_an_automatic_device_map_places_everything(stock_checkpoint):
    model = retrofit(stock_checkpoint("qwen3"), dtype=torch.float32, device_map="auto")
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert "RouterBlock" in model._no_split_modules
    assert model(prompts(2)).paths.shape == (2, NUM_BLOCKS)


def test_two_devices():
    script = Path(__file__).with_name("two_devices.py")
    root = script.parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, str(script)], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "every tensor was where it was used" in done.stdout
