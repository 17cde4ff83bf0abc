"""Every path, every family: cached equals uncached, a batch equals its rows, a plain loop gives the same numbers."""

import random

import pytest
import torch
from transformers import Cache, CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from data_models import load_path_model
from train_models import PathCache
from train_models.paths import path_to_layer_indices

FAMILIES = ["llama", "qwen2", "qwen3"]
NUM_BLOCKS = 6
NAMED_PATHS = {
    "default": (1, 1, 1, 1, 1, 1),
    "block 0 skipped": (0, 1, 1, 1, 2, 1),
    "block 0 repeated": (2, 1, 1, 0, 1, 1),
    "all but one skipped": (0, 0, 0, 1, 0, 0),
    "all repeated": (2, 2, 2, 2, 2, 2),
    "first half skipped": (0, 0, 0, 1, 2, 1),
}


def random_paths(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = random.Random(seed)
    paths = [tuple(generator.choice((0, 1, 1, 2)) for _ in range(NUM_BLOCKS)) for _ in range(count)]
    return [path if sum(path) else (1,) * NUM_BLOCKS for path in paths]


def prompts(count: int, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 61, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=[(f, a) for f in FAMILIES for a in ("sdpa", "eager")], ids="-".join)
def model(request, stock_checkpoint):
    family, attention = request.param
    return load_path_model(stock_checkpoint(family), dtype=torch.float32, attn_implementation=attention)


def greedy(model, input_ids, steps=6, **kwargs):
    kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
    new_tokens = model.generate(input_ids, max_new_tokens=steps, do_sample=False, **kwargs)
    return new_tokens[:, input_ids.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_path_gives_the_stock_logits_exactly(family, stock_model, stock_checkpoint):
    stock, ours = stock_model(family), load_path_model(stock_checkpoint(family), dtype=torch.float32)
    input_ids = prompts(3)
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    for attention_mask in (None, mask):
        assert torch.equal(stock(input_ids, attention_mask).logits, ours(input_ids, attention_mask).logits)
    stock_tokens = stock.generate(input_ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    ours_tokens = ours.generate(input_ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(stock_tokens, ours_tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", [*NAMED_PATHS.values(), *random_paths(3, seed=5)])
def test_hidden_states_equal_a_plain_loop_over_stock_layers(family, path, stock_model, stock_checkpoint):
    stock, ours = stock_model(family), load_path_model(stock_checkpoint(family), dtype=torch.float32)
    input_ids = prompts(2)
    hidden = stock.model.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1])[None]
    rotary = stock.model.rotary_emb(hidden, positions)
    for block, visits in enumerate(path):
        for _ in range(visits):
            hidden = stock.model.layers[block](hidden, attention_mask=None, position_embeddings=rotary)
    expected = stock.model.norm(hidden)
    actual = ours.model(input_ids, layer_indices=path_to_layer_indices(path)).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("path", NAMED_PATHS.values(), ids=NAMED_PATHS.keys())
def test_cached_tokens_equal_uncached_ones(model, path):
    layer_indices = path_to_layer_indices(path)
    input_ids = prompts(2)
    cached = greedy(model, input_ids, layer_indices=layer_indices)
    assert model.block_applications.tolist() == [6 * sum(path)] * 2
    assert torch.equal(cached, greedy(model, input_ids, layer_indices=layer_indices, use_cache=False))


def test_a_left_padded_batch_of_different_paths_equals_each_row_alone(model):
    paths = [*NAMED_PATHS.values(), *random_paths(2, seed=1)]
    lengths = [9, 4, 7, 1, 9, 5, 2, 8]
    rows = [prompts(1, length, seed=length) for length in lengths]
    batch = torch.zeros(8, 9, dtype=torch.long)
    mask = torch.zeros_like(batch)
    for row, tokens in enumerate(rows):
        batch[row, 9 - lengths[row] :] = tokens
        mask[row, 9 - lengths[row] :] = 1
    layer_indices = [path_to_layer_indices(path) for path in paths]
    together = greedy(model, batch, attention_mask=mask, layer_indices=layer_indices)
    alone = [greedy(model, tokens, layer_indices=indices) for tokens, indices in zip(rows, layer_indices, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert together.unique().numel() > 8, "the rows should differ, or the test shows nothing"


def test_a_right_padded_forward_equals_the_unpadded_one(model):
    tokens, path = prompts(1, 6), path_to_layer_indices((1, 2, 0, 1, 1, 2))
    padded = torch.cat([tokens, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 6 + [0] * 5])
    expected = model(tokens, layer_indices=path).logits
    for arguments in ({}, {"attention_mask": mask}):  # causal attention never looks right
        torch.testing.assert_close(model(padded, layer_indices=path, **arguments).logits[:, :6], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_cache_handed_in_ends_up_right(family, stock_checkpoint):
    model = load_path_model(stock_checkpoint(family), dtype=torch.float32)
    input_ids, path = prompts(2, 9), path_to_layer_indices((0, 2, 1, 0, 1, 1))
    for cache in (DynamicCache(), DynamicCache(config=model.config), PathCache()):
        model(input_ids[:, :6], past_key_values=cache, layer_indices=path)
        assert cache.get_seq_length() == 6
        assert cache.layers[0].get_seq_length() == 0, "a skipped block has no entry"
        assert [slot.get_seq_length() for slot in (cache.layers[1], cache.layers[1 + NUM_BLOCKS])] == [6, 6]
        rest = model(input_ids[:, 6:], past_key_values=cache)
        whole = model(input_ids, layer_indices=path)
        torch.testing.assert_close(rest.logits, whole.logits[:, 6:])


def test_caches_without_room_are_refused_with_a_sentence(stock_checkpoint):
    model = load_path_model(stock_checkpoint("llama"), dtype=torch.float32)
    input_ids = prompts(1)
    with pytest.raises(ValueError, match="a Cache, which has no room"):
        model(input_ids, past_key_values=Cache(layer_class_to_replicate=DynamicLayer))
    with pytest.raises(ValueError, match="an offloaded cache"):
        model(input_ids, past_key_values=DynamicCache(offloading=True))
    filled = DynamicCache()
    filled.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with pytest.raises(ValueError, match="already holds tokens"):
        model(input_ids, past_key_values=filled)


def test_rows_can_leave_join_and_change_places(model):
    paths = random_paths(5, seed=2)
    input_ids = prompts(5, 8)
    cache = PathCache()
    model(input_ids[:, :5], past_key_values=cache, layer_indices=[path_to_layer_indices(path) for path in paths])
    cache.batch_select_indices(torch.tensor([4, 0, 2]))
    assert cache.paths == [paths[4], paths[0], paths[2]]
    cache.crop(-1)
    cache.crop(0)
    cache.crop(4)  # as older releases of transformers call it: keep so many
    cache.batch_repeat_interleave(2)
    rows = [4, 4, 0, 0, 2, 2]
    assert cache.get_seq_length() == 4
    rest = model(input_ids[rows, 4:], past_key_values=cache)
    whole = model(input_ids[rows], layer_indices=[path_to_layer_indices(paths[row]) for row in rows])
    torch.testing.assert_close(rest.logits, whole.logits[:, 4:], rtol=1e-4, atol=1e-4)
    cache.batch_select_indices(torch.tensor([True, False, False, False, False, True]))
    assert cache.paths == [paths[4], paths[2]]
    cache.reset()
    assert (cache.get_seq_length(), cache.paths) == (0, None)


def test_beam_search_sampling_and_return_sequences(model):
    input_ids, mask = prompts(3), torch.ones(3, 9, dtype=torch.long)
    layer_indices = [path_to_layer_indices(path) for path in random_paths(3, seed=3)]
    for arguments in (
        {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
    ):
        outcomes = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            outcomes.append(
                model.generate(
                    input_ids,
                    attention_mask=mask,
                    layer_indices=layer_indices,
                    max_new_tokens=5,
                    use_cache=use_cache,
                    **arguments,
                )
            )
        assert torch.equal(*outcomes)


def test_embeddings_instead_of_tokens(model):
    input_ids, layer_indices = prompts(2), path_to_layer_indices((1, 0, 2, 1, 1, 1))
    embeddings = model.get_input_embeddings()(input_ids)
    from_embeddings = model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones_like(input_ids),
        layer_indices=layer_indices,
        max_new_tokens=5,
        do_sample=False,
    )
    assert torch.equal(from_embeddings, greedy(model, input_ids, steps=5, layer_indices=layer_indices))
    before = embeddings.clone()
    model(inputs_embeds=embeddings, layer_indices=[[0, 1], [3, 3]])
    assert torch.equal(before, embeddings), "what the caller holds stays as it is"


def test_an_empty_batch(stock_checkpoint):
    model = load_path_model(stock_checkpoint("llama"), dtype=torch.float32)
    output = model(torch.zeros(0, 4, dtype=torch.long))
    assert output.logits.shape == (0, 4, 61)
    assert output.paths.shape == (0, NUM_BLOCKS)


def test_a_prompt_longer_than_the_context(stock_checkpoint):
    model = load_path_model(stock_checkpoint("llama"), dtype=torch.float32)
    assert model(prompts(1, 300), layer_indices=[0, 1, 1, 5]).logits.isfinite().all()


def test_hidden_states_on_request(stock_model, stock_checkpoint):
    stock, ours = stock_model("llama"), load_path_model(stock_checkpoint("llama"), dtype=torch.float32)
    input_ids = prompts(2)
    expected = stock(input_ids, output_hidden_states=True).hidden_states
    actual = ours(input_ids, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected)
    for ours_state, stock_state in zip(actual, expected, strict=True):
        assert torch.equal(ours_state, stock_state)
    with pytest.raises(ValueError, match="output_attentions is not offered"):
        ours(input_ids, output_attentions=True)


def test_hidden_states_by_configuration(stock_model, stock_checkpoint):
    ours = load_path_model(stock_checkpoint("llama"), dtype=torch.float32)
    input_ids = prompts(2)
    expected = stock_model("llama")(input_ids, output_hidden_states=True).hidden_states
    assert ours(input_ids).hidden_states is None
    ours.config.output_hidden_states = True
    assert torch.equal(torch.stack(ours(input_ids).hidden_states), torch.stack(expected))
    assert ours(input_ids, output_hidden_states=False).hidden_states is None


def test_the_loss_is_that_of_the_stock_model(stock_model, stock_checkpoint):
    stock, ours = stock_model("llama"), load_path_model(stock_checkpoint("llama"), dtype=torch.float32)
    input_ids, losses = prompts(2), []
    for arguments in (
        {},
        {"num_items_in_batch": torch.tensor(100)},  # accumulated steps: a sum over all of them is divided once
        {"shift_labels": prompts(2, seed=1)},  # sequences that are split over devices
    ):
        expected = stock(input_ids, labels=input_ids, **arguments).loss
        torch.testing.assert_close(ours(input_ids, labels=input_ids, **arguments).loss, expected)
        losses.append(expected.item())
    assert len(set(losses)) == 3


def test_contradictions_are_named(stock_checkpoint):
    model = load_path_model(stock_checkpoint("llama"), dtype=torch.float32)
    input_ids, cache = prompts(2), PathCache()
    with pytest.raises(ValueError, match="paths for 3 rows, but the batch has 2"):
        model(input_ids, layer_indices=[[0], [1], [2]])
    with pytest.raises(ValueError, match="block 6"):
        model(input_ids, layer_indices=[6])
    model(input_ids, past_key_values=cache, layer_indices=[0, 1])
    with pytest.raises(ValueError, match="differ from the paths"):
        model(input_ids, past_key_values=cache, layer_indices=[0, 2])
    with pytest.raises(ValueError, match="batch has 1 rows, but past_key_values holds 2"):
        model(input_ids[:1], past_key_values=cache)


def test_sliding_window_layers_follow_paths(stock_model, stock_checkpoint):
    changes = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    stock = stock_model("qwen2", changes)
    ours = load_path_model(stock_checkpoint("qwen2", **changes), dtype=torch.float32)
    assert set(ours.config.layer_types) == {"full_attention", "sliding_attention"}
    input_ids = prompts(2, 11)
    assert torch.equal(stock(input_ids).logits, ours(input_ids).logits)
    for path in [*NAMED_PATHS.values(), (1, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1)]:
        layer_indices = [path_to_layer_indices(path), path_to_layer_indices((1, 1, 0, 2, 0, 2))]
        cached = greedy(ours, input_ids, layer_indices=layer_indices)
        assert torch.equal(cached, greedy(ours, input_ids, layer_indices=layer_indices, use_cache=False))


def test_assisted_decoding_with_a_cache_of_ones_own(stock_checkpoint):
    changes = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    model = load_path_model(stock_checkpoint("qwen2", **changes), dtype=torch.float32)
    for seed, path in enumerate(NAMED_PATHS.values()):
        input_ids, layer_indices = prompts(1, 6, seed).repeat(1, 2), path_to_layer_indices(path)
        expected = greedy(model, input_ids, layer_indices=layer_indices)
        for cache in (PathCache(), PathCache(model.config), None):
            assistance = {"prompt_lookup_num_tokens": 2, "past_key_values": cache}
            assert torch.equal(greedy(model, input_ids, layer_indices=layer_indices, **assistance), expected)


def test_the_older_name_of_dtype(stock_checkpoint):
    assert load_path_model(stock_checkpoint("llama"), torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_an_unsupported_family_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="'gpt2' is not supported; supported are llama, qwen2, qwen3"):
        load_path_model(str(tmp_path))


@pytest.mark.parametrize("path", NAMED_PATHS.values(), ids=NAMED_PATHS.keys())
def test_a_static_cache_gives_the_same_tokens(model, path):
    layer_indices = [path_to_layer_indices(path), path_to_layer_indices((1, 0, 2, 1, 0, 1))]
    input_ids = prompts(2)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    expected = greedy(model, input_ids, attention_mask=mask, layer_indices=layer_indices)
    static = StaticCache(config=model.config, max_cache_len=16)
    for arguments in ({"cache_implementation": "static"}, {"past_key_values": static}):
        tokens = greedy(model, input_ids, attention_mask=mask, layer_indices=layer_indices, **arguments)
        assert torch.equal(tokens, expected)
    used = [slot.is_initialized for slot in static.layers]
    assert used == [any(each.count(block) > visit for each in layer_indices) for visit in (0, 1) for block in range(6)]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_give_the_same_tokens(family, decisive):
    model = decisive(family)
    input_ids = prompts(2)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    shared = [*NAMED_PATHS.values(), *random_paths(2, seed=4)]
    cases = [{"layer_indices": path_to_layer_indices(path)} for path in shared]
    cases += [
        {"layer_indices": [path_to_layer_indices(path) for path in pair]}
        for pair in zip(shared, reversed(shared), strict=True)
    ]
    cases.append({})  # the routers decide
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    expected = [model.generate(input_ids, **case, **arguments) for case in cases]
    decided = model(input_ids, mask).paths
    assert not torch.equal(*decided), "the rows should differ"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_blocks()
    graphs = torch._dynamo.utils.counters["stats"]
    for case, tokens in zip(cases, expected, strict=True):
        assert torch.equal(model.generate(input_ids, cache_implementation="static", **case, **arguments), tokens), case
        if case == cases[len(shared) - 1]:
            assert graphs["unique_graphs"] == 1, "one compilation serves every block, visit and path"
    assert graphs["unique_graphs"] == 2, "and one more serves every single row"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_step_serves_a_path(family, decisive):
    model, input_ids = decisive(family), prompts(2)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    compiled = CompileConfig(mode="default")
    compiled._compile_all_devices = True
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    graphs.clear()
    counts = []
    for path in (NAMED_PATHS["block 0 skipped"], NAMED_PATHS["block 0 skipped"], NAMED_PATHS["first half skipped"]):
        path_arguments = arguments | {"layer_indices": path_to_layer_indices(path)}
        expected = model.generate(input_ids, **path_arguments)
        found = model.generate(input_ids, cache_implementation="static", compile_config=compiled, **path_arguments)
        assert torch.equal(found, expected)
        counts.append(graphs["unique_graphs"])
    assert 0 < counts[0] == counts[1] < counts[2], "compiled once a path, and not again for another token or prompt"
    model.generate(input_ids, cache_implementation="static", layer_indices=[0, 1, 2, 4], **arguments)
    assert graphs["unique_graphs"] == counts[2], "and only where asked for"
