"""What a forward pass must not do: wait for the device, ask routers again, keep what no row needs."""

import gc
import weakref
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from train_models import PathCache
from train_models.paths import path_to_layer_indices

NUM_BLOCKS = 6
PATHS = [(1, 0, 2, 0, 1, 1), (2, 1, 0, 0, 1, 2), (1, 1, 1, 0, 1, 1), (0, 0, 1, 0, 2, 1)]

# Operations that cannot return before the device has computed their input. Indexing with a mask is one of them, too.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}


class Operations(TorchDispatchMode):
    """Counts the operations that reach the device, by name."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_"):
            name += "_by_mask" * any(part is not None and part.dtype == torch.bool for part in args[1])
        self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def watched():
    """Operations, and as "to the host" the reads of whole tensors, which a CPU tensor serves without an operation."""
    operations, patch = Operations(), pytest.MonkeyPatch()
    for method in ("tolist", "numpy", "cpu"):
        original = getattr(torch.Tensor, method)

        def read(tensor, *args, original=original, **kwargs):
            operations.counts["to the host"] += 1
            return original(tensor, *args, **kwargs)

        patch.setattr(torch.Tensor, method, read)
    try:
        with operations, torch.no_grad():
            yield operations.counts
    finally:
        patch.undo()


def waits(counts: Counter) -> int:
    """How often the host waits for the device."""
    return sum(count for name, count in counts.items() if name in WAITING | {"to the host"} or "_by_mask" in name)


def prompts(count: int = 4) -> torch.Tensor:
    return torch.randint(2, 61, (count, 19), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_static_routing_runs_the_operations_of_the_stock_model(family, decisive, stock_model):
    stock, model = stock_model(family).requires_grad_(False), decisive(family)
    model.model.is_static_routing = True
    input_ids, mask = prompts(), torch.ones(4, 20, dtype=torch.long)
    mask[1, :7] = 0
    counts = []
    for each, cache in ((stock, DynamicCache(config=stock.config)), (model, PathCache(model.config))):
        with watched() as prefill:
            each(input_ids, mask[:, :19], past_key_values=cache, logits_to_keep=1)
        with watched() as decode:
            each(input_ids[:, :1], mask, past_key_values=cache, logits_to_keep=1)
        counts += [prefill, decode]
    expected_prefill, expected_decode, prefill, decode = counts
    assert decode == expected_decode
    reported_paths = Counter(["lift_fresh", "view", "permute", "clone"])  # on the CPU, once a prompt
    # The head as one product of all rows, where the stock model makes one per row.
    one_product, per_row = Counter(["clone", "mm"]), Counter(["bmm", "expand", "expand", "view"])
    assert prefill + per_row == expected_prefill + reported_paths + one_product


def test_the_head_reads_the_last_states_of_all_rows_in_one_product(decisive):
    model, heads = decisive("qwen2"), []
    model.lm_head.register_forward_pre_hook(lambda _, arguments: heads.append(arguments[0].is_contiguous()))
    model(prompts(), logits_to_keep=1)
    model(prompts(), logits_to_keep=torch.tensor([3, 7]))
    assert heads == [True, True]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_decoding_never_waits_for_the_device(family, decisive, stock_model):
    stock, model = stock_model(family), decisive(family)
    input_ids = prompts()
    expected_cache, cache = DynamicCache(config=stock.config), PathCache()
    stock(input_ids, past_key_values=expected_cache)
    model(input_ids, past_key_values=cache)
    assert len(set(cache.paths)) > 1
    router_calls = []
    for router in model.model.routers:
        router.register_forward_hook(lambda *_: router_calls.append(1))
    with watched() as expected:
        stock(input_ids[:, :1], past_key_values=expected_cache)
    with watched() as first:
        model(input_ids[:, :1], past_key_values=cache)
    with watched() as second:
        model(input_ids[:, :1], past_key_values=cache)
    assert waits(expected) == waits(first) == waits(second) == 0
    assert not router_calls
    assert second["lift_fresh"] == expected["lift_fresh"], "row indices stay on the device, none is made anew"


def test_generation_waits_once_a_block_at_prefill_and_no_more(decisive, stock_model):
    stock, model = stock_model("llama"), decisive()
    input_ids = prompts()
    counted = {}
    for steps in (2, 6):
        for each in (stock, model):
            mask = torch.ones_like(input_ids)
            with watched() as counts:
                each.generate(input_ids, attention_mask=mask, max_new_tokens=steps, do_sample=False)
            counted[each, steps] = waits(counts)
    for steps in (2, 6):
        assert counted[model, steps] - counted[stock, steps] == NUM_BLOCKS


def test_routers_on_the_embeddings_wait_once(decisive):
    model, input_ids = decisive(router_config={"router_input": "embeddings"}), prompts()
    with watched() as counts:
        paths = model(input_ids, past_key_values=PathCache()).paths
    assert len(set(map(tuple, paths.tolist()))) > 1
    assert waits(counts) == 1


def test_a_known_path_is_not_waited_for(decisive):
    model, input_ids = decisive(), prompts()
    layer_indices = [path_to_layer_indices(path) for path in PATHS]
    for arguments in ({}, {"output_router_logits": True}):
        with watched() as counts:
            model(input_ids, layer_indices=layer_indices, past_key_values=PathCache(), **arguments)
        assert waits(counts) == 0


def test_the_cache_holds_what_ran_and_nothing_else(decisive):
    model, input_ids = decisive(), prompts()
    cache = PathCache()
    model(input_ids, layer_indices=[path_to_layer_indices(path) for path in PATHS], past_key_values=cache)
    model(input_ids[:, :1], past_key_values=cache)
    numbers = sum(part.numel() for slot in cache.layers if slot.is_initialized for part in (slot.keys, slot.values))
    config = model.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert numbers == sum(map(sum, PATHS)) * 20 * 2 * heads * size
    assert not cache.layers[3].is_initialized, "no row runs block 3"


def test_the_model_lets_go_of_a_cache_that_its_caller_dropped(decisive):
    model, cache = decisive(), PathCache()
    model(prompts(), past_key_values=cache)
    alive = weakref.ref(cache)
    del cache
    gc.collect()
    assert alive() is None
    assert model.block_applications.sum() > 0, "the count outlives the cache"


def test_a_row_that_skips_costs_its_block_nothing(decisive):
    model, input_ids = decisive(), prompts()
    rows_run = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, block=block: rows_run.append((block, len(args[0]))))
        for block, layer in enumerate(model.model.layers)
    ]
    model(input_ids, layer_indices=[path_to_layer_indices(path) for path in PATHS])
    for hook in hooks:
        hook.remove()
    expected = [
        (block, count)
        for block in range(NUM_BLOCKS)
        for visit in (0, 1)
        if (count := sum(path[block] > visit for path in PATHS))
    ]
    assert rows_run == expected
