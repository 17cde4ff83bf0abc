"""Attention back ends: the same decisions and tokens as sdpa, or a sentence.

Flex and flash attention have no kernels on a CPU. What is ours with them is which mask each group of rows gets: flex's
is tested in torch's unfused form, flash's 2D masks with a stand-in that takes the same arguments. The kernels
themselves were not run.
"""

import importlib.util

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from train_models import PathCache, following
from train_models.paths import path_to_layer_indices

LENGTHS = [19, 3, 11, 1, 8, 16]
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Six prompts of different lengths and their mask."""
    tokens = torch.randint(2, 61, (6, 19), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(19) >= 19 - torch.tensor(LENGTHS)[:, None]).long()
    return tokens * mask, mask


def attend_with_a_2d_mask(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **_kwargs):
    """What flash attention computes: causal up to the last real key, padding left out, GQA, sliding windows."""
    if attention_mask is not None:  # a static cache is longer than its mask
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    num_keys = key.shape[2]
    query_place = torch.arange(num_keys - query.shape[2], num_keys)[:, None]
    key_place = torch.arange(num_keys)[None]
    allowed = key_place <= query_place
    if sliding_window is not None:
        allowed = allowed & (key_place > query_place - sliding_window)
    allowed = allowed.expand(query.shape[0], 1, -1, -1)
    if attention_mask is not None:
        assert attention_mask.shape == (query.shape[0], num_keys), "one mask a row of this group"
        allowed = allowed & attention_mask[:, None, None].bool()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture(params=["sdpa", "eager", "flex_attention", "two_dimensional_masks"])
def back_end(request, monkeypatch):
    """The name of a back end, made to run on a CPU."""
    if request.param == "flex_attention":
        monkeypatch.setattr(following, "check_attention", lambda *_: None)
        torch.compiler.set_stance("force_eager")
    if request.param == "two_dimensional_masks":
        AttentionInterface.register("two_dimensional_masks", attend_with_a_2d_mask)
        AttentionMaskInterface.register("two_dimensional_masks", flash_attention_mask)
    yield request.param
    torch.compiler.set_stance("default")


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen2", SLIDING), ("qwen3", {})])
def test_a_padded_batch_of_different_paths_is_that_of_sdpa(family, changes, back_end, decisive):
    sdpa, model = decisive(family, changes), decisive(family, changes, attn_implementation=back_end)
    assert model.config._attn_implementation == back_end
    input_ids, mask = left_padded()
    expected = sdpa(input_ids, mask, output_router_logits=True)
    assert len({tuple(path) for path in expected.paths.tolist()}) > 3, "the paths should differ"
    output = model(input_ids, mask, output_router_logits=True)
    assert torch.equal(output.paths, expected.paths)
    torch.testing.assert_close(output.router_logits, expected.router_logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output.logits[mask.bool()], expected.logits[mask.bool()], rtol=1e-3, atol=1e-3)
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    tokens = sdpa.generate(input_ids, **arguments)
    assert torch.equal(model.generate(input_ids, **arguments), tokens)
    assert torch.equal(model.generate(input_ids, cache_implementation="static", **arguments), tokens)
    assert torch.equal(model.generate(input_ids, use_cache=False, **arguments), tokens)


def test_prompts_without_padding_have_no_mask_to_divide(back_end, decisive):
    sdpa, model = decisive(), decisive(attn_implementation=back_end)
    input_ids, _ = left_padded()
    paths = [(1, 0, 2, 1, 1, 1), (2, 1, 0, 0, 1, 2), (1, 1, 1, 1, 1, 1)] * 2
    layer_indices = [path_to_layer_indices(path) for path in paths]
    outputs = []
    for each in (sdpa, model):
        cache = PathCache()
        outputs.append(each(input_ids, layer_indices=layer_indices, past_key_values=cache).logits)
        outputs.append(each(input_ids[:, :1], past_key_values=cache).logits)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outputs[3], outputs[1], rtol=1e-3, atol=1e-3)


def test_flex_attention_on_a_cpu_is_refused(decisive):
    model = decisive(attn_implementation="flex_attention")
    with pytest.raises(ValueError, match=r"'flex_attention', whose kernels .* use 'sdpa' there"):
        model(left_padded()[0])


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash attention is installed")
def test_flash_attention_that_is_not_installed_is_refused(decisive):
    with pytest.raises(ImportError, match=r"FlashAttention2 .* doesn't seem to be installed"):
        decisive(attn_implementation="flash_attention_2")


def test_a_back_end_that_does_not_exist_is_named(decisive):
    with pytest.raises(ValueError, match='attn_implementation="none_such"` is not supported'):
        decisive(attn_implementation="none_such")


def test_continuous_batching_is_refused(decisive):
    with pytest.raises(ValueError, match="packs many prompts into one row"):
        decisive().generate_batch([[3, 4, 5], [6, 7]])
