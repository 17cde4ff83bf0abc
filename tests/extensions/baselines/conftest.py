"""Toy models whose right answer is known."""

import pytest
import torch

from train_models import retrofit


@pytest.fixture(scope="module")
def routed(stock_checkpoint):
    return retrofit(stock_checkpoint("llama"), dtype=torch.float32).eval()


@pytest.fixture
def routed_with_idle_blocks(stock_checkpoint):
    """Blocks 2 and 4 return their input."""
    routed = retrofit(stock_checkpoint("llama"), dtype=torch.float32).eval()
    with torch.no_grad():
        for block in (2, 4):
            layer = routed.model.layers[block]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return routed
