import torch
from transformers import MistralConfig, MistralForCausalLM, MistralModel

from train_models.following import CausalLMOverPaths, FollowsPaths
from train_models.paths import path_to_layer_indices


def test_a_new_family_is_as_short_as_the_guide_says():
    class PathMistralModel(FollowsPaths, MistralModel):
        pass

    class PathMistralForCausalLM(CausalLMOverPaths, MistralForCausalLM):
        base_model_type = PathMistralModel

    config = MistralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        head_dim=8,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    stock = MistralForCausalLM(config).eval()
    model = PathMistralForCausalLM(config).eval()
    model.load_state_dict(stock.state_dict())
    input_ids = torch.randint(2, 61, (2, 11))
    assert torch.equal(model(input_ids).logits, stock(input_ids).logits)
    arguments = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 5, "do_sample": False}
    for path in [(0, 1, 2, 1, 0), (2, 1, 0, 0, 1)]:
        layer_indices = [path_to_layer_indices(path), [0, 2, 2, 3]]
        cached = model.generate(input_ids, layer_indices=layer_indices, **arguments)
        assert torch.equal(cached, model.generate(input_ids, layer_indices=layer_indices, use_cache=False, **arguments))
