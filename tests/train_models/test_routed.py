"""Routed models: decisions a row, from the prompt alone, once; checkpoints that travel."""

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MistralModel, TextStreamer

from train_models import PathCache, pool_windows, retrofit, route
from train_models.paths import path_to_layer_indices
from train_models.routed import RoutedCausalLM, RoutedConfigFields, RoutedModel

FAMILIES = ["llama", "qwen2", "qwen3"]
NUM_BLOCKS = 6


def prompts(count: int, length: int = 19, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 61, (count, length), generator=torch.Generator().manual_seed(seed))


def scatter_decisions(model) -> None:
    """Larger router weights, so that rows of random prompts decide differently."""
    with torch.no_grad():
        for router in model.model.routers:
            router.layers[-1].weight.mul_(40)


@pytest.fixture(scope="module")
def routed(stock_checkpoint):
    """family -> retrofitted model with decisive random routers, in eval mode."""
    made = {}

    def make(family: str = "llama", **arguments):
        key = (family, repr(arguments))
        if key not in made:
            made[key] = retrofit(stock_checkpoint(family), dtype=torch.float32, **arguments).eval()
            scatter_decisions(made[key])
        made[key].model.is_static_routing, made[key].model.routing_control = False, -0.5
        return made[key]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_static_routing_gives_the_stock_model_exactly(family, routed, stock_model):
    stock, model = stock_model(family), routed(family)
    input_ids, mask = prompts(3), torch.ones(3, 19, dtype=torch.long)
    mask[1, :7] = 0
    assert not torch.equal(stock(input_ids, mask).logits, model(input_ids, mask).logits)
    model.model.is_static_routing = True
    for attention_mask in (None, mask):
        assert torch.equal(stock(input_ids, attention_mask).logits, model(input_ids, attention_mask).logits)
    tokens = [
        each.generate(input_ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for each in (stock, model)
    ]
    assert torch.equal(*tokens)
    model.model.is_static_routing, model.model.routing_control = False, 0.5
    assert torch.equal(stock(input_ids, mask).logits, model(input_ids, mask).logits), "p = 0.5 is the base model"


@pytest.mark.parametrize("family", FAMILIES)
def test_decisions_equal_a_plain_loop_over_stock_layers(family, routed, stock_model):
    stock, model = stock_model(family), routed(family)
    for row in range(4):
        input_ids = prompts(1, 5 + 7 * row, seed=row)
        hidden = stock.model.embed_tokens(input_ids)
        rotary = stock.model.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        path, logits = [], []
        for layer, router in zip(stock.model.layers, model.model.routers, strict=True):
            logits.append(router(*pool_windows(hidden, torch.ones_like(input_ids), 8)))
            path.append(route(logits[-1]).item())
            for _ in range(path[-1]):
                hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        output = model(input_ids, output_router_logits=True)
        assert output.paths.tolist() == [path]
        torch.testing.assert_close(output.router_logits, torch.stack(logits, dim=1))
        torch.testing.assert_close(output.logits, stock.lm_head(stock.model.norm(hidden)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_depends_neither_on_its_batch_nor_on_padding(family, routed):
    model = routed(family)
    lengths = [19, 3, 11, 1, 8, 16]
    rows = [prompts(1, length, seed=length) for length in lengths]
    alone = [model(tokens, output_router_logits=True) for tokens in rows]
    assert len({tuple(output.paths[0].tolist()) for output in alone}) > 3, "the paths should differ"
    for side in ("left", "right"):
        batch, mask = torch.zeros(6, 19, dtype=torch.long), torch.zeros(6, 19, dtype=torch.long)
        for row, tokens in enumerate(rows):
            place = slice(19 - lengths[row], None) if side == "left" else slice(0, lengths[row])
            batch[row, place], mask[row, place] = tokens[0], 1
        together = model(batch, mask, output_router_logits=True)
        for row, output in enumerate(alone):
            assert together.paths[row].tolist() == output.paths[0].tolist()
            torch.testing.assert_close(together.router_logits[row], output.router_logits[0], rtol=1e-4, atol=1e-4)
        if side == "left":
            generated = model.generate(batch, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, 19:]
            expected = [model.generate(tokens, max_new_tokens=5, do_sample=False)[0, -5:] for tokens in rows]
            assert torch.equal(generated, torch.stack(expected))


def test_routers_read_the_prompt_and_not_the_completion(routed):
    model = routed()
    prompt, lengths = prompts(3, 9), torch.tensor([9, 9, 9])
    expected = model(prompt).paths
    for seed in range(3):
        with_completion = torch.cat([prompt, prompts(3, 6, seed=seed + 7)], dim=1)
        assert torch.equal(model(with_completion, prompt_length=lengths).paths, expected)
        prompt_mask = torch.arange(15).expand(3, 15) < 9
        assert torch.equal(model(with_completion, prompt_mask=prompt_mask).paths, expected)
    left_padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), with_completion], dim=1)
    mask = (torch.arange(19) >= 4).long().expand(3, 19)
    assert torch.equal(model(left_padded, mask, prompt_length=lengths).paths, expected)
    with pytest.raises(ValueError, match="shape"):
        model(prompt, prompt_mask=prompt_mask)
    with pytest.raises(ValueError, match="one length per row, 3 in all"):
        model(prompt, prompt_length=torch.tensor([9]))


@pytest.mark.parametrize("kind", ["prompt lookup", "assistant"])
def test_routers_do_not_read_the_candidates_of_assisted_decoding(kind, routed, stock_model):
    model = routed()
    if kind == "assistant":
        assistant = stock_model("llama", {"num_hidden_layers": 2})
        assistant.generation_config.assistant_confidence_threshold = 0.0  # always some candidates
        assistance = {"assistant_model": assistant}
    else:
        assistance = {"prompt_lookup_num_tokens": 3}
    paths = set()
    for seed in range(6):
        input_ids = prompts(1, 7, seed).repeat(1, 2)  # so that looking up finds something
        mask = torch.ones_like(input_ids)
        mask[:, : seed // 3] = 0
        arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        expected = model.generate(input_ids, **arguments)
        decided = model.model._last_call.get()[0].paths()
        assert torch.equal(model.generate(input_ids, **arguments, **assistance), expected)
        assert model.model._last_call.get()[0].paths() == decided
        paths.update(decided)
    longer = prompts(8, 40)
    model.generate(longer, attention_mask=torch.ones_like(longer), max_new_tokens=1, do_sample=False)
    decided = model.model._last_call.get()[0].paths()
    assert decided == [tuple(path) for path in model(longer).paths.tolist()], "nothing stays behind"
    assert len(paths) > 3, "the prompts should differ"


def test_no_prompt_at_all_means_the_base_model(routed):
    output = routed()(prompts(1, 4), prompt_length=torch.tensor([0]))
    assert output.paths.tolist() == [[1] * NUM_BLOCKS]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decision_is_made_once_and_kept_with_the_cache(family, routed):
    model = routed(family)
    input_ids, mask = prompts(4), torch.ones(4, 19, dtype=torch.long)
    calls = []
    hooks = [router.register_forward_hook(lambda *_: calls.append(1)) for router in model.model.routers]
    output = model.generate(
        input_ids, attention_mask=mask, max_new_tokens=7, do_sample=False, return_dict_in_generate=True
    )
    for hook in hooks:
        hook.remove()
    assert len(calls) == NUM_BLOCKS, "one call a router, at prefill"
    assert output.past_key_values.paths == [tuple(path) for path in model(input_ids).paths.tolist()]
    for arguments in ({"use_cache": False}, {"cache_implementation": "static"}):
        again = model.generate(input_ids, attention_mask=mask, max_new_tokens=7, do_sample=False, **arguments)
        assert torch.equal(output.sequences, again)


def test_block_applications_equal_a_count_by_hooks(routed):
    model, counts = routed(), []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: counts.append(len(args[0]))) for layer in model.model.layers
    ]
    model.generate(prompts(4), attention_mask=torch.ones(4, 19), max_new_tokens=6, do_sample=False)
    assert model.block_applications.tolist() == [6 * sum(path) for path in model.model._last_call.get()[0].paths()]
    assert model.block_applications.sum() == sum(counts)
    counts.clear()
    model(prompts(3))
    assert model.block_applications.sum() == sum(counts)
    for hook in hooks:
        hook.remove()


def test_the_whole_range_of_the_knob_runs(routed):
    model, layers_used = routed(), []
    for control in (-1.0, -0.75, -0.5, 0.0, 0.5, 1.0):
        model.model.routing_control = control
        tokens = [
            model.generate(
                prompts(2), attention_mask=torch.ones(2, 19), max_new_tokens=4, do_sample=False, use_cache=use_cache
            )
            for use_cache in (True, False)
        ]
        assert torch.equal(*tokens)
        layers_used.append(model.block_applications.sum().item())
    assert layers_used[0] == 0
    assert layers_used == sorted(layers_used)
    assert layers_used[-1] == 2 * NUM_BLOCKS * 2
    with pytest.raises(ValueError, match="routing_control"):
        model.model.routing_control = 2.0


def test_beams_sampling_streaming_and_embeddings(routed):
    class Collector:
        def __init__(self):
            self.pieces = []

        def decode(self, tokens, **_):
            self.pieces.append(len(tokens))
            return ""

    model = routed()
    input_ids = prompts(2)
    mask = torch.ones_like(input_ids)
    for arguments in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}):
        outcomes = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            outcomes.append(
                model.generate(input_ids, attention_mask=mask, max_new_tokens=5, use_cache=use_cache, **arguments)
            )
        assert torch.equal(*outcomes)
    collector = Collector()
    model.generate(input_ids[:1], attention_mask=mask[:1], max_new_tokens=3, streamer=TextStreamer(collector))
    assert collector.pieces
    embeddings = model.get_input_embeddings()(input_ids)
    assert torch.equal(
        model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=4, do_sample=False),
        model.generate(input_ids, attention_mask=mask, max_new_tokens=4, do_sample=False)[:, 19:],
    )
    assert model(torch.zeros(0, 3, dtype=torch.long)).paths.shape == (0, NUM_BLOCKS)
    assert model(prompts(1, 1)).logits.isfinite().all()
    with pytest.raises(ValueError, match="prefill_chunk_size is set"):
        model.generate(input_ids, attention_mask=mask, max_new_tokens=2, prefill_chunk_size=4)


def test_teacher_forcing_follows_the_labels_while_the_routers_look_on(routed):
    model = routed()
    input_ids, path = prompts(2), (1, 0, 2, 1, 0, 2)
    indices = path_to_layer_indices(path)
    forced = model(input_ids, layer_indices=indices, output_router_logits=True, output_router_inputs=True)
    assert forced.paths.tolist() == [list(path)] * 2
    assert torch.equal(forced.logits, model(input_ids, layer_indices=indices).logits)
    assert forced.router_inputs.shape == (2, NUM_BLOCKS, 8, 32)
    for block, router in enumerate(model.model.routers):
        expected = router(forced.router_inputs[:, block], forced.window_mask)
        torch.testing.assert_close(forced.router_logits[:, block], expected)
    hidden = model(input_ids, layer_indices=indices, output_hidden_states=True).hidden_states
    for block in range(NUM_BLOCKS):
        pooled, _ = pool_windows(hidden[block], torch.ones_like(input_ids), 8)
        torch.testing.assert_close(forced.router_inputs[:, block], pooled)


def test_gradients_reach_the_routers_and_nothing_else(stock_checkpoint):
    model = retrofit(stock_checkpoint("qwen3"), dtype=torch.float32)
    output = model(prompts(2), layer_indices=[0, 1, 3, 3, 5], output_router_logits=True)
    output.router_logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".routers." in name), name
        assert parameter.requires_grad == (".routers." in name), name


def test_routers_on_the_embeddings(stock_checkpoint):
    model = retrofit(stock_checkpoint("llama"), dtype=torch.float32, router_config={"router_input": "embeddings"})
    input_ids = prompts(2)
    inputs = model(input_ids, layer_indices=[0, 1, 2], output_router_inputs=True).router_inputs
    expected, _ = pool_windows(model.get_input_embeddings()(input_ids), torch.ones_like(input_ids), 8)
    for block in range(NUM_BLOCKS):
        torch.testing.assert_close(inputs[:, block], expected)
    with pytest.raises(ValueError, match="router_input is 'last'"):
        retrofit(stock_checkpoint("llama"), router_config={"router_input": "last"})


@pytest.mark.parametrize("family", FAMILIES)
def test_retrofit_keeps_the_base_bit_for_bit(family, stock_checkpoint, stock_model):
    stock = stock_model(family).state_dict()
    model = retrofit(stock_checkpoint(family), dtype=torch.float32, seed=3)
    ours = model.state_dict()
    assert set(ours) - set(stock) == {name for name in ours if name.startswith("model.routers.")}
    assert all(torch.equal(ours[name], weight) for name, weight in stock.items())
    again = retrofit(stock_checkpoint(family), dtype=torch.float32, seed=3).state_dict()
    other = retrofit(stock_checkpoint(family), dtype=torch.float32, seed=4).state_dict()
    weight = "model.routers.2.layers.0.weight"
    assert torch.equal(ours[weight], again[weight])
    assert not torch.equal(ours[weight], other[weight])
    assert not ours["model.routers.2.layers.0.bias"].any()
    assert model.config.base_model_name == stock_checkpoint(family)


def test_retrofit_takes_the_older_name_of_dtype(stock_checkpoint):
    model = retrofit(stock_checkpoint("llama"), torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_retrofit_refuses_what_does_not_fit(stock_checkpoint, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(stock_checkpoint("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(ValueError, match=r"does not fit its configuration: model\.layers\.6"):
        retrofit(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="'gpt2' is not supported"):
        retrofit(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_works_anywhere_with_torch_and_transformers_alone(family, routed, tmp_path):
    model = routed(family)
    expected = model(prompts(2), output_router_logits=True)
    model.model.routing_control = -0.25
    model.save_pretrained(tmp_path / "first")
    shutil.move(tmp_path / "first", tmp_path / "moved")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)  # as the other process, for bit-equal numbers
assert not any("train_models" == name.split(".")[0] for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained("moved", trust_remote_code=True, dtype=torch.float32)
assert model.model.routing_control == -0.25 and model.model.num_windows == 8
model.model.routing_control = -0.5
input_ids = torch.load("input.pt")
output = model(input_ids, output_router_logits=True)
torch.save((output.logits, output.paths, output.router_logits), "output.pt")
model.save_pretrained("again")
"""
    torch.save(prompts(2), tmp_path / "input.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    logits, paths, router_logits = torch.load(tmp_path / "output.pt")
    assert torch.equal(logits, expected.logits)
    assert torch.equal(paths, expected.paths)
    assert torch.equal(router_logits, expected.router_logits)
    files = {file.name for file in (tmp_path / "again").iterdir()}
    assert files == {file.name for file in (tmp_path / "moved").iterdir()}
    assert "routed.py" in files


def test_without_trust_the_sentence_says_what_to_pass(routed, tmp_path):
    routed().save_pretrained(tmp_path / "checkpoint")
    load = "AutoModelForCausalLM.from_pretrained('checkpoint', trust_remote_code=False)"
    run = subprocess.run(
        [sys.executable, "-c", f"from transformers import AutoModelForCausalLM; {load}"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "trust_remote_code=True" in run.stderr.splitlines()[-1]
    # Where this repository's classes are imported, they are used, and nothing of the checkpoint is executed.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", trust_remote_code=False)
    assert type(model) is type(routed())


def test_another_number_of_windows_is_said_aloud(routed, tmp_path, caplog):
    model = routed()
    model.config.trained_num_windows = 8
    model.save_pretrained(tmp_path)
    model.config.trained_num_windows = None
    with caplog.at_level(logging.WARNING):
        same = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, num_windows=8)
        assert not [record for record in caplog.records if "num_windows" in record.getMessage()]
        other = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, num_windows=4)
        assert any("trained with num_windows=8 but will read 4" in record.getMessage() for record in caplog.records)
    assert (same.model.num_windows, other.model.num_windows) == (8, 4)
    assert other(prompts(1), output_router_inputs=True).router_inputs.shape[2] == 4
    with pytest.raises(ValueError, match="num_windows is 0"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, num_windows=0)


def test_a_new_family_is_ten_lines(tmp_path):
    class RoutedMistralConfig(RoutedConfigFields, MistralConfig):
        model_type = "drllm_mistral"

    class RoutedMistralModel(RoutedModel, MistralModel):
        config_class = RoutedMistralConfig

    class RoutedMistralForCausalLM(RoutedCausalLM, MistralForCausalLM):
        config_class = RoutedMistralConfig
        base_model_type = RoutedMistralModel

    fields = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5, "head_dim": 8}
    torch.manual_seed(0)
    stock = MistralForCausalLM(MistralConfig(**fields)).eval()
    model = RoutedMistralForCausalLM(RoutedMistralConfig(**fields)).eval()
    model.load_state_dict(stock.state_dict(), strict=False)
    scatter_decisions(model)
    input_ids = prompts(3)
    arguments = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(input_ids, **arguments)
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(input_ids, **other, **arguments), tokens)
    assert len(set(map(tuple, model(input_ids).paths.tolist()))) > 1
    model.model.is_static_routing = True
    assert torch.equal(stock(input_ids).logits, model(input_ids).logits)


def test_bfloat16_routes_and_decodes(stock_checkpoint):
    model = retrofit(stock_checkpoint("llama"), dtype=torch.bfloat16).eval()
    scatter_decisions(model)
    output = model(prompts(3), output_router_logits=True, past_key_values=PathCache())
    assert output.logits.dtype == torch.bfloat16
    assert output.router_logits.dtype == torch.float32
    assert model(prompts(3, 1), past_key_values=output.past_key_values).logits.isfinite().all()


def test_routers_with_domains_are_refused(stock_checkpoint, tmp_path):
    """An older version had them; without them the routers would decide where those did not."""
    retrofit(stock_checkpoint("llama")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"router_domain": 4}))
    with pytest.raises(ValueError, match="the routers have domains, which only their own code knows"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"router_domain": 0}))
    AutoModelForCausalLM.from_pretrained(tmp_path)
