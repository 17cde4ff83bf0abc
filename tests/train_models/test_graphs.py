"""Decoding from graphs gives the tokens of eager decoding.

On a CPU a stand-in takes the place of the capture: each "graph" is the function itself, run on the same buffers in the
same order. The tests marked `gpu` run the same cases with CUDA graphs.
"""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from transformers import CompileConfig, DynamicCache

from data_models import load_path_model
from train_models import PathCache, graphs
from train_models.graphs import DecodingGraphs
from train_models.paths import path_to_layer_indices

FAMILIES = ["llama", "qwen2", "qwen3"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PATHS = [(1, 1, 1, 1, 1, 1), (0, 1, 2, 1, 1, 0), (2, 0, 0, 1, 2, 1), (1, 2, 2, 2, 2, 2), (0, 0, 0, 1, 0, 0)]
ROWS = 3


def prompts(rows: int = ROWS, length: int = 9, device: str = "cpu") -> dict:
    """Left-padded prompts of different lengths."""
    ids = torch.randint(2, 61, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : row + 1] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def generated(model, inputs: dict, steps: int = 12, **arguments) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=steps, do_sample=False, **arguments).tolist()


@contextmanager
def switched_on(model):
    """`decode_with_graphs`; on a CPU with the stand-in. Yields the graphs."""
    if model.device.type == "cuda":
        model.decode_with_graphs()
    else:
        model.model.graphs = DecodingGraphs(model.model, capture=lambda function: function)
    yield model.model.graphs
    model.decode_with_graphs(False)


@pytest.fixture(autouse=True)
def _short_buffers(monkeypatch):
    monkeypatch.setattr(graphs, "FIRST_LENGTH", 16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_eager_decoding(family, device, decisive):
    model = decisive(family).to(device)
    indices = [path_to_layer_indices(path) for path in PATHS]
    cases = [{"layer_indices": path} for path in indices]
    cases += [{"layer_indices": indices[first : first + ROWS]} for first in range(3)]
    cases += [{}, {"cache_implementation": "static"}, {"cache_implementation": "static", "layer_indices": indices[1:4]}]
    inputs, alone = prompts(device=device), prompts(1, device=device)
    expected = [(generated(model, inputs, **case), model.block_applications.tolist()) for case in cases]
    expected_alone = [generated(model, alone, layer_indices=path) for path in indices]
    assert len({tuple(path) for path in model(**inputs).paths.tolist()}) > 1, "rows decide differently"
    with switched_on(model) as served:
        for case, wanted in zip(cases, expected, strict=True):
            assert (generated(model, inputs, **case), model.block_applications.tolist()) == wanted, case
        assert served.captures == 2, "16 and 32 tokens; no path, and no prompt, brings another capture"
        for path, wanted in zip(indices, expected_alone, strict=True):
            assert generated(model, alone, layer_indices=path) == wanted
        assert served.captures == 4, "two more lengths for one row"
    assert generated(model, inputs, **cases[0]) == expected[0][0], "switched off again"


@pytest.mark.parametrize("device", DEVICES)
def test_steps_load_the_buffers_once(device, decisive, monkeypatch):
    model, loads = decisive("llama").to(device), []
    load = graphs._StepGraphs.load
    with switched_on(model):
        generated(model, prompts(length=4, device=device), steps=2)  # the first use
        monkeypatch.setattr(graphs._StepGraphs, "load", lambda self, cache: loads.append(cache) or load(self, cache))
        for arguments in ({}, {"cache_implementation": "static"}):
            generated(model, prompts(length=4, device=device), steps=10, **arguments)
    assert len(loads) == 2, "one per prompt: nothing in `generate` touches the cache at every step"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_cache_len", [None, 64])
def test_the_cache_is_right_whenever_it_is_looked_at(device, max_cache_len, decisive):
    """Two conversations take turns, each continues with several tokens at once, one is reordered, one is reset."""
    model = decisive("llama").to(device)
    inputs = prompts(device=device)
    indices = [path_to_layer_indices(path) for path in PATHS]

    def steps(cache, first: int, count: int, **arguments) -> list:
        seen = []
        for number in range(first, first + count):
            token = torch.arange(2, 2 + ROWS, device=device)[:, None] + number
            seen.append(model(token, past_key_values=cache, **arguments).logits)
        return seen

    def conversations() -> list[torch.Tensor]:
        first, second = (PathCache(model.config, max_cache_len=max_cache_len) for _ in range(2))
        with torch.inference_mode():
            model(**inputs, past_key_values=first, layer_indices=indices[1:4])
            model(**inputs, past_key_values=second)
            found = steps(first, 0, 3) + steps(second, 0, 2) + steps(first, 3, 2)
            if max_cache_len is None:
                continued = copy.deepcopy(first)
                found.append(model(inputs["input_ids"][:, :4], past_key_values=continued).logits)
                found += steps(continued, 0, 3)
            first.reorder_cache(torch.tensor([2, 0, 0], device=device))
            found += steps(first, 5, 2)
            first.crop(-2)
            found += steps(first, 5, 2)
            slots = [layer for layer in first.layers if layer.is_initialized]
            found += [part.clone() for layer in slots for part in (layer.keys, layer.values)]
            second.reset()
            model(**inputs, past_key_values=second, layer_indices=indices[2])
            return found + steps(second, 0, 3) + steps(first, 7, 1)

    expected = conversations()
    with switched_on(model):
        found = conversations()
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_stock_cache_of_the_caller_ends_up_right(decisive):
    model, inputs = decisive("llama"), prompts()
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    expected = generated(model, inputs, past_key_values=caches[0])
    with switched_on(model):
        assert generated(model, inputs, past_key_values=caches[1]) == expected
        generated(model, inputs, layer_indices=[0, 1, 2])  # takes the buffers over
    assert caches[1].paths == caches[0].paths
    for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        assert ours.is_initialized == theirs.is_initialized
        if ours.is_initialized:
            torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)


def test_path_models_decode_from_graphs_too(stock_checkpoint):
    model = load_path_model(stock_checkpoint("qwen3"), dtype=torch.float32)
    expected = generated(model, prompts(), layer_indices=[0, 1, 1, 4])
    with switched_on(model):
        assert generated(model, prompts(), layer_indices=[0, 1, 1, 4]) == expected


@pytest.mark.slow
def test_compiled_blocks_are_captured_compiled(decisive):
    model, inputs = decisive("llama"), prompts(length=5)
    cases = [{}, {"layer_indices": [0, 2, 2, 3]}]
    expected = [generated(model, inputs, steps=6, **case) for case in cases]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_blocks()
    with switched_on(model):
        assert [generated(model, inputs, steps=6, **case) for case in cases] == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one for all blocks, visits and paths"


def test_changed_weights_are_captured_again(decisive):
    model = decisive("llama")
    with switched_on(model) as served:
        before = generated(model, prompts(length=4), steps=4)
        weight = model.model.layers[1].mlp.down_proj.weight
        with torch.no_grad():
            weight.mul_(-3)  # in place: graphs read the new numbers
        changed = generated(model, prompts(length=4), steps=4)
        assert served.captures == 1
        weight.data = weight.data.clone()
        assert generated(model, prompts(length=4), steps=4) == changed != before
        assert served.captures == 2


def test_a_difference_from_eager_decoding_is_refused_at_the_first_use(decisive, monkeypatch):
    model = decisive("llama")
    step = graphs._StepGraphs.step

    def late(self, embeddings, mask, position_ids, cache):
        return step(self, embeddings, mask, position_ids + 1, cache)

    with switched_on(model):
        monkeypatch.setattr(graphs._StepGraphs, "step", late)
        with pytest.raises(RuntimeError, match=r"step 1 differs from eager .* call decode_with_graphs\(False\)"):
            generated(model, prompts())
        monkeypatch.undo()
        assert generated(model, prompts())


@pytest.mark.parametrize("broken", [(0, 0), (5, 1)])
def test_every_graph_is_compared(broken, decisive):
    model, numbers = decisive("llama"), []

    def capture(function):
        numbers.append(function)
        is_broken = len(numbers) == 2 + 2 * broken[0] + broken[1]
        return (lambda: None) if is_broken else function

    model.model.graphs = DecodingGraphs(model.model, capture=capture)
    with pytest.raises(RuntimeError, match="differs from eager"):
        generated(model, prompts(1))
    assert len(numbers) == 1 + 2 * len(PATHS[0])


def test_a_failing_capture_is_one_sentence(decisive):
    model = decisive("llama")

    def fail(_function):
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")

    model.model.graphs = DecodingGraphs(model.model, capture=fail)
    with pytest.raises(RuntimeError, match=r"3 rows of 16 tokens could not be captured \(operation not permitted when"):
        generated(model, prompts())


def test_where_it_does_not_apply_it_says_so(decisive):
    model, inputs = decisive("llama"), prompts()
    with pytest.raises(ValueError, match="needs a CUDA GPU, but the model is on cpu"):
        model.decode_with_graphs()
    wrong = {
        "beams": {"num_beams": 2},
        "an assistant": {"prompt_lookup_num_tokens": 2},
        "the cache": {"use_cache": False},
        "two streams": {"guidance_scale": 2.0},
        "compiled": {"cache_implementation": "static", "compile_config": CompileConfig()},
        "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    }
    with switched_on(model):
        for words, arguments in wrong.items():
            with pytest.raises(ValueError, match=f"decode_with_graphs does not apply: .*{words}"):
                generated(model, inputs, **arguments)
        cache = PathCache()
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="no_grad"):
            model(inputs["input_ids"][:, :1], past_key_values=cache)
        with torch.no_grad(), pytest.raises(ValueError, match="no hidden states"):
            model(inputs["input_ids"][:, :1], past_key_values=cache, output_hidden_states=True)
        model.train()
        with torch.no_grad(), pytest.raises(ValueError, match=r"train mode; call model.eval\(\)"):
            model(inputs["input_ids"][:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_implementation": "eager"}, "not 'sdpa'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'dynamic'"),
    ],
)
def test_models_that_cannot_are_refused(changes, words, decisive, stock_checkpoint):
    attention = {"attn_implementation": changes.pop("attn_implementation", "sdpa")}
    model = decisive("llama", changes, **attention)
    with pytest.raises(ValueError, match=words):
        DecodingGraphs(model.model, capture=lambda function: function)


def test_sliding_windows_hooks_and_adapters_are_refused(decisive):
    sliding = decisive("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2})
    hooked, adapted = decisive("llama"), decisive("llama")
    hooked.model.layers[2].mlp.register_forward_hook(lambda *_: None)
    adapted.model.layers[0].self_attn.q_proj.disable_adapters = False
    for model, words in ((sliding, "slides"), (hooked, "hooks"), (adapted, "adapters")):
        with pytest.raises(ValueError, match=words):
            DecodingGraphs(model.model, capture=lambda function: function)


def test_a_copy_of_the_model_starts_without_graphs(decisive):
    model = decisive("llama")
    with switched_on(model) as served:
        tokens = generated(model, prompts())
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied.model.graphs is None
            assert generated(copied, prompts()) == tokens
        assert served.captures == 2
        assert served.buffer_bytes == sum(4 * 6 * ROWS * length * 2 * 8 * 4 for length in (16, 32)), "as documented"


@pytest.mark.parametrize("arguments", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}])
def test_compiled_blocks_refuse_torchs_own_graphs(arguments, decisive):
    with pytest.raises(ValueError, match="decode_with_graphs"):
        decisive("llama").compile_blocks(**arguments)
