"""Long prompts, many rows, chunks, and caches that live on over the turns of a chat."""

import copy
import random

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from train_models import PathCache, RoutedLlamaConfig, RoutedLlamaForCausalLM, retrofit
from train_models.paths import path_to_layer_indices

NUM_BLOCKS = 6
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}


def prompts(count: int, length: int = 19, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 61, (count, length), generator=torch.Generator().manual_seed(seed))


def greedy(model, input_ids: torch.Tensor, steps: int = 5, **arguments) -> torch.Tensor:
    """Prompt and new tokens [batch, T + steps]."""
    mask = torch.ones_like(input_ids)
    return model.generate(input_ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, **arguments)


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen2", SLIDING)])
def test_128_rows_with_128_paths(family, changes, stock_checkpoint):
    model = retrofit(stock_checkpoint(family, **changes), dtype=torch.float32).eval()
    generator, paths = random.Random(0), set()
    while len(paths) < 128:
        path = tuple(generator.choice((0, 1, 2)) for _ in range(NUM_BLOCKS))
        paths |= {path} if sum(path) else set()
    layer_indices = [path_to_layer_indices(path) for path in sorted(paths)]
    calls = []
    hooks = [layer.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in model.model.layers]
    tokens = greedy(model, prompts(128), steps=3, layer_indices=layer_indices)
    for hook in hooks:
        hook.remove()
    assert len(calls) == 3 * 2 * NUM_BLOCKS, "a block runs at most twice a forward pass, however many paths there are"
    assert model.block_applications.tolist() == [3 * len(indices) for indices in layer_indices]
    for row in range(0, 128, 5):
        alone = greedy(model, prompts(128)[row : row + 1], steps=3, layer_indices=layer_indices[row])
        assert torch.equal(tokens[row], alone[0]), layer_indices[row]


def test_many_rows_decide_as_each_alone(decisive):
    model, input_ids = decisive(), prompts(128, 23)
    paths = model(input_ids).paths
    assert len(set(map(tuple, paths.tolist()))) > 20
    for row in range(0, 128, 9):
        assert torch.equal(model(input_ids[row : row + 1]).paths[0], paths[row])


@pytest.mark.slow
def test_a_prompt_of_32k_tokens():
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 1, "max_position_embeddings": 40000, "initializer_range": 0.3}
    torch.manual_seed(0)
    stock = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    model = RoutedLlamaForCausalLM(RoutedLlamaConfig(**sizes)).eval()
    model.load_state_dict(stock.state_dict(), strict=False)
    wanted = (1, 2, 0, 1)
    with torch.no_grad():
        for router, action in zip(model.model.routers, wanted, strict=True):
            router.layers[-1].bias[action] = 100.0
        input_ids = prompts(1, 32768 + 5)
        cache = PathCache()
        output = model(input_ids, past_key_values=cache, logits_to_keep=1, output_router_inputs=True)
        assert cache.paths == [wanted]
        windows = model.get_input_embeddings()(input_ids)[0, :32768].double().unflatten(0, (8, 4096)).mean(1)
        torch.testing.assert_close(output.router_inputs[0, 0].double(), windows, rtol=1e-4, atol=1e-5)
        next_token = output.logits[:, -1].argmax(-1, keepdim=True)
        step = model(next_token, past_key_values=cache).logits[:, -1]
        whole = torch.cat([input_ids, next_token], dim=1)
        layer_indices = path_to_layer_indices(wanted)
        again = model(whole, layer_indices=layer_indices, logits_to_keep=1, use_cache=False).logits[:, -1]
    torch.testing.assert_close(step, again, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen2", SLIDING)])
def test_chunked_prefill_along_a_known_path_is_the_whole_prefill(family, changes, decisive):
    model, input_ids = decisive(family, changes), prompts(3)
    layer_indices = [path_to_layer_indices(path) for path in [(0, 1, 2, 0, 1, 1), (2, 0, 1, 1, 0, 2), (1,) * 6]]
    expected = greedy(model, input_ids, layer_indices=layer_indices)
    assert torch.equal(greedy(model, input_ids, layer_indices=layer_indices, prefill_chunk_size=4), expected)
    model.model.is_static_routing = True
    assert torch.equal(greedy(model, input_ids, prefill_chunk_size=4), greedy(model, input_ids))


def test_chunked_prefill_that_would_have_to_decide_is_refused(decisive):
    model, input_ids = decisive(), prompts(2)
    with pytest.raises(ValueError, match="a router reads the whole prompt"):
        greedy(model, input_ids, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="needs the whole prompt and not a chunk of it"):
        model(input_ids[:, :8], torch.ones_like(input_ids), past_key_values=PathCache())


def test_the_first_forward_pass_decides_and_later_chunks_follow(decisive):
    model, input_ids = decisive(), prompts(4)
    cache = PathCache()
    first = model(input_ids[:, :8], past_key_values=cache).paths
    assert not torch.equal(first, model(input_ids).paths), "a decision on the whole prompt differs here"
    rest = model(input_ids[:, 8:], past_key_values=cache)
    assert torch.equal(rest.paths, first)
    whole = model(input_ids, layer_indices=[path_to_layer_indices(path) for path in first.tolist()])
    torch.testing.assert_close(rest.logits, whole.logits[:, 8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen2", SLIDING), ("qwen3", {})])
@pytest.mark.parametrize("make_cache", [PathCache, DynamicCache], ids=["PathCache", "DynamicCache"])
def test_a_cache_carried_over_the_turns_of_a_chat_keeps_the_decision(family, changes, make_cache, decisive):
    model, cache = decisive(family, changes), make_cache()
    calls = []
    hooks = [router.register_forward_hook(lambda *_: calls.append(1)) for router in model.model.routers]
    talk, decided = prompts(3, 7), None
    for turn in range(3):
        answered = greedy(model, talk, past_key_values=cache)
        decided = decided or cache.paths
        assert cache.paths == decided
        assert len(calls) == NUM_BLOCKS, "the routers were asked in the first turn only"
        layer_indices = [path_to_layer_indices(path) for path in decided]
        assert torch.equal(greedy(model, talk, layer_indices=layer_indices), answered)
        talk = torch.cat([answered, prompts(3, 6, seed=turn + 5)], dim=1)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        anew = model(talk).paths
    greedy(model, talk, past_key_values=(fresh := make_cache()))
    assert fresh.paths == [tuple(path) for path in anew.tolist()]
    assert fresh.paths != decided, "a new cache means a new decision"


def test_a_copied_prefix_serves_many_questions(decisive):
    model, prefix = decisive(), prompts(1, 11)
    cache = PathCache()
    model(prefix, past_key_values=cache)
    for seed in range(3):
        asked = torch.cat([prefix, prompts(1, 6, seed=seed + 3)], dim=1)
        answered = greedy(model, asked, past_key_values=copy.deepcopy(cache))
        assert torch.equal(answered, greedy(model, asked, layer_indices=path_to_layer_indices(cache.paths[0])))
    assert cache.get_seq_length() == 11
