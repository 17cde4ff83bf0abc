"""`layer_indices` as an attribute of the base model: what the argument does, until it is taken back."""

import pytest
import torch

from data_models import load_path_model
from train_models import retrofit

PATH, OTHER = [0, 1, 1, 3, 4, 5], [0, 2, 3, 4, 4, 5]
PROMPTS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def model(request, stock_checkpoint):
    return load_path_model(stock_checkpoint(request.param), dtype=torch.float32)


def generate(model, **arguments):
    return model.generate(PROMPTS, max_new_tokens=5, do_sample=False, **arguments)


@pytest.mark.parametrize("path", [PATH, [PATH, OTHER]], ids=["for all rows", "one per row"])
def test_setting_it_does_what_the_argument_does(model, path):
    assert hasattr(model.model, "layer_indices")
    assert model.model.layer_indices is None
    default, wanted = model(PROMPTS).logits, model(PROMPTS, layer_indices=path).logits
    answers = generate(model, layer_indices=path), generate(model, layer_indices=path, num_beams=2)
    model.model.layer_indices = path
    assert torch.equal(model(PROMPTS).logits, wanted)
    assert not torch.allclose(wanted, default)
    assert torch.equal(generate(model), answers[0])
    assert torch.equal(generate(model, use_cache=False), answers[0])
    assert torch.equal(generate(model, num_beams=2), answers[1])
    assert torch.equal(model(PROMPTS, layer_indices=list(range(6))).logits, default), "the argument wins"
    model.model.layer_indices = None
    assert torch.equal(model(PROMPTS).logits, default)


def test_what_is_no_path_is_refused_when_it_is_set(model):
    for wrong in ([1, 0], [0, 9], [[0, 1], [2, 2, 2]]):
        with pytest.raises(ValueError, match="layer_indices"):
            model.model.layer_indices = wrong
    assert model.model.layer_indices is None
    model.model.layer_indices = [PATH, OTHER, PATH]
    with pytest.raises(ValueError, match="paths for 3 rows, but the batch has 2"):
        model(PROMPTS)


def test_a_change_takes_effect_with_the_next_prompt(model):
    """Also one in the list itself, as a search would edit it."""
    wanted = model(PROMPTS, layer_indices=PATH, use_cache=True)
    then = model(PROMPTS[:, :1], past_key_values=wanted.past_key_values).logits
    own = list(PATH)
    model.model.layer_indices = own
    first = model(PROMPTS, use_cache=True)
    own.remove(3)
    assert torch.equal(model(PROMPTS[:, :1], past_key_values=first.past_key_values).logits, then)
    assert torch.equal(model(PROMPTS).logits, model(PROMPTS, layer_indices=[0, 1, 1, 4, 5]).logits)


def test_routers_decide_nothing_while_it_is_set_and_it_is_not_saved(stock_checkpoint, tmp_path):
    routed = retrofit(stock_checkpoint("llama"), dtype=torch.float32).eval()
    routed.model.layer_indices = PATH
    assert routed(PROMPTS).paths.tolist() == [[1, 2, 0, 1, 1, 1]] * 2
    routed.save_pretrained(tmp_path)
    assert type(routed).from_pretrained(tmp_path).model.layer_indices is None
    assert retrofit(stock_checkpoint("llama")).model.layer_indices is None
