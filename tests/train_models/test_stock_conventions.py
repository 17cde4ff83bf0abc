"""What users of transformers expect of any model: saving, Trainer, Auto classes, generation options, compilation.

Each is offered, or refused with one sentence (train_models/README.md lists the refusals).
"""

import inspect
import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    DataCollatorWithFlattening,
    GenerationMixin,
    Trainer,
    TrainingArguments,
)

from train_models import RoutedLlamaConfig, RoutedLlamaForCausalLM, RoutedLlamaModel, retrofit

NUM_BLOCKS = 6
SENTENCE = "the loss on labels trains no router"


def prompts(count: int = 3, length: int = 19, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 61, (count, length), generator=torch.Generator().manual_seed(seed))


def run_elsewhere(code: str, folder, timeout: int = 120) -> subprocess.CompletedProcess:
    """Runs `code` in a process that does not have this repository on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(folder / "modules")
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


# Whole-step compilation


@pytest.mark.parametrize("fullgraph", [False, True])
def test_mixed_paths_are_compiled_once_for_all_calls(fullgraph, decisive):
    model, input_ids = decisive(), prompts()
    mask = torch.ones_like(input_ids)
    mask[1, :7] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    assert len(set(map(tuple, model(input_ids, mask).paths.tolist()))) > 1
    expected = model.generate(input_ids, **arguments)
    applications = model.block_applications
    compiled = CompileConfig(mode="default", backend="eager", fullgraph=fullgraph)
    compiled._compile_all_devices = True
    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    graphs.clear()
    counts = []
    for _ in range(10):
        tokens = model.generate(input_ids, cache_implementation="static", compile_config=compiled, **arguments)
        assert torch.equal(tokens, expected)
        assert torch.equal(model.block_applications, applications)
        counts.append(graphs["unique_graphs"])
    assert counts == [1] * 10


# torch.export


def test_export_along_a_given_path_and_refusals(decisive):
    model = decisive().requires_grad_(False)
    arguments = {"input_ids": prompts(1), "layer_indices": [0, 1, 1, 3]}
    program = torch.export.export(model, (), arguments, strict=False)
    torch.testing.assert_close(program.module()(**arguments).logits, model(**arguments).logits)
    with pytest.raises(ValueError, match="cannot follow a decision"):
        torch.export.export(model, (), {"input_ids": prompts(1)}, strict=False)
    with pytest.raises(ValueError, match=r"torch\.export of a forward pass with a cache is not supported"):
        torch.export.export(model, (), arguments | {"use_cache": True}, strict=False)


@pytest.mark.parametrize("is_static", [False, True])
def test_export_with_a_number_of_rows_that_is_not_fixed(is_static, decisive):
    model = decisive().requires_grad_(False)
    model.model.is_static_routing = is_static
    arguments = {"input_ids": prompts(2)} | ({} if is_static else {"layer_indices": [0, 1, 1, 3]})
    shapes = {"input_ids": {0: torch.export.Dim("rows", min=2, max=64)}}
    shapes |= {} if is_static else {"layer_indices": [None] * 4}
    program = torch.export.export(model, (), arguments, dynamic_shapes=shapes, strict=False)
    for count in (2, 5):
        arguments["input_ids"] = prompts(count, seed=count)
        actual, expected = program.module()(**arguments), model(**arguments)
        torch.testing.assert_close(actual.logits, expected.logits)
        assert torch.equal(actual.paths, expected.paths)


# Tuples


def test_a_configuration_that_asks_for_tuples_gets_them(decisive):
    model = decisive()
    expected = model(prompts())
    tokens = model.generate(prompts(), max_new_tokens=3, do_sample=False)
    model.config.return_dict = False
    logits, _cache, paths = model(prompts())
    assert torch.equal(logits, expected.logits)
    assert torch.equal(paths, expected.paths)
    assert torch.equal(model.model(prompts())[-1], expected.paths)
    assert torch.equal(model(prompts(), return_dict=True).logits, expected.logits)
    assert torch.equal(model.generate(prompts(), max_new_tokens=3, do_sample=False), tokens)


# The meta device


def test_a_decision_without_values_is_refused(decisive):
    model = decisive().to("meta")
    tokens = prompts().to("meta")
    with pytest.raises(ValueError, match="the device 'meta' does not hold; pass layer_indices"):
        model(tokens)
    assert model(tokens, layer_indices=[0, 1]).logits.shape == (3, 19, 61)
    model.model.is_static_routing = True
    assert model(tokens).logits.device.type == "meta"


# Engines that run models of transformers


def test_engines_with_a_transformers_back_end_are_told_that_they_cannot_run_it():
    assert not RoutedLlamaForCausalLM.is_backend_compatible()


# Pickling


def test_the_first_model_that_an_auto_class_loads_can_be_pickled(decisive, tmp_path):
    decisive().save_pretrained(tmp_path / "checkpoint")
    code = """
import pickle, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("checkpoint", trust_remote_code=True)
again = pickle.loads(pickle.dumps(model))
torch.save(model, "model.pt")
input_ids = torch.arange(2, 12)[None]
for other in (again, torch.load("model.pt", weights_only=False)):
    assert torch.equal(other(input_ids).logits, model(input_ids).logits)
"""
    run = run_elsewhere(code, tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]


def test_generation_is_a_direct_base():
    assert GenerationMixin in RoutedLlamaForCausalLM.__bases__


def test_a_model_is_pickled_after_a_forward_pass(decisive):
    model = decisive()
    expected = model(prompts()).logits
    assert torch.equal(pickle.loads(pickle.dumps(model))(prompts()).logits, expected)


# Trainer


def trainer(model, folder, **arguments) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in prompts(4)]
    settings = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        max_steps=2,
        disable_tqdm=True,
        save_strategy="no",
        **arguments,
    )
    return Trainer(model=model, args=settings, train_dataset=rows, eval_dataset=rows)


def test_trainer_predicts_logits_alone(decisive, tmp_path):
    shapes = []
    tester = trainer(decisive(), tmp_path)
    tester.compute_metrics = lambda prediction: shapes.append(prediction.predictions.shape) or {}
    assert tester.predict(tester.eval_dataset).predictions.shape == (4, 19, 61)
    tester.evaluate()
    assert shapes == [(4, 19, 61)] * 2


def test_paths_are_on_the_device_of_the_model(decisive):
    with torch.device("meta"):
        from train_models.cache import RowSchedule

        schedule = RowSchedule.of([(1, 0, 2)], 3, torch.device("meta"))
    assert schedule.paths_tensor().device.type == "meta"
    assert decisive()(prompts()).paths.device.type == "cpu"


def test_training_on_labels_says_how_routers_are_trained(stock_checkpoint, tmp_path, caplog):
    model = retrofit(stock_checkpoint("llama"), dtype=torch.float32)
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="does not require grad"):
        trainer(model, tmp_path).train()
    assert caplog.text.count(SENTENCE) == 1
    caplog.clear()
    everything = retrofit(stock_checkpoint("llama"), dtype=torch.float32).requires_grad_(True)
    with caplog.at_level(logging.WARNING):
        trainer(everything, tmp_path).train()
    assert caplog.text.count(SENTENCE) == 1, "once, not at each step"
    caplog.clear()
    base_only = retrofit(stock_checkpoint("llama"), dtype=torch.float32).requires_grad_(True)
    base_only.model.routers.requires_grad_(False)
    base_only.train()(prompts(), labels=prompts())
    model.train()(prompts(), labels=prompts(), layer_indices=[0, 1], output_router_logits=True)
    model.eval()(prompts(), labels=prompts())
    assert SENTENCE not in caplog.text


@pytest.mark.parametrize("factor", [0.0, 0.2])
def test_label_smoothing_shifts_labels_as_for_the_stock_model(factor, stock_checkpoint, stock_model, tmp_path):
    model = retrofit(stock_checkpoint("llama"), dtype=torch.float32).eval()
    model.model.is_static_routing = True
    batch = {"input_ids": prompts(), "labels": prompts()}
    losses = []
    for candidate in (stock_model("llama"), model):
        tester = trainer(candidate, tmp_path, label_smoothing_factor=factor)
        losses.append(tester.compute_loss(candidate, dict(batch)))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_along_paths(use_reentrant, decisive):
    model, input_ids = decisive().train().requires_grad_(True), prompts()
    arguments = {"labels": input_ids, "layer_indices": [[0, 1, 1, 3], [0, 2, 3, 5, 5], [1, 2, 3, 4, 5]]}
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids, **arguments).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


# Hidden states and attentions


@pytest.mark.parametrize("selection", [[0, 2], [-1], [6, 0], []])
def test_a_list_selects_hidden_states(selection, decisive, stock_model):
    stock, model = stock_model("llama"), decisive()
    model.model.is_static_routing = True
    expected = stock(prompts(), output_hidden_states=selection).hidden_states
    actual = model(prompts(), output_hidden_states=selection).hidden_states
    if not selection:
        assert not any(state is not None for state in actual or ())
        return
    assert [state is None for state in actual] == [state is None for state in expected]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True) if ours is not None)


def test_a_state_that_is_not_there_is_named(decisive):
    with pytest.raises(ValueError, match="names state 7, but there are states 0 to 6"):
        decisive()(prompts(), output_hidden_states=[7])


def test_attentions_by_configuration_are_refused(decisive):
    model = decisive(attn_implementation="eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions is not offered"):
        model(prompts())
    assert model(prompts(), output_attentions=False).attentions is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attentions_of_generate_are_refused(implementation, decisive):
    model = decisive(attn_implementation=implementation)
    with pytest.raises(ValueError, match="output_attentions is not offered"):
        model.generate(prompts(), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


# Generation options


def test_an_early_exit_assistant_is_refused_and_changes_nothing(decisive):
    model = decisive()
    expected = model.generate(prompts(1), max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match="assistant_early_exit is not supported"):
        model.generate(prompts(1), max_new_tokens=3, do_sample=False, assistant_early_exit=3)
    assert model.config.num_hidden_layers == NUM_BLOCKS
    assert torch.equal(model.generate(prompts(1), max_new_tokens=3, do_sample=False), expected)


def test_a_list_of_prompt_lengths_is_repeated_for_return_sequences(decisive):
    model, lengths = decisive(), [19, 12, 5]
    arguments = {"max_new_tokens": 3, "num_return_sequences": 2, "num_beams": 2, "do_sample": False}
    tokens = [
        model.generate(prompts(), attention_mask=torch.ones(3, 19), prompt_length=prompt_length, **arguments)
        for prompt_length in (lengths, torch.tensor(lengths))
    ]
    assert tokens[0].shape[0] == 6
    assert torch.equal(*tokens)


# Auto classes


def test_auto_classes_know_the_configuration_and_the_base_model(decisive, tmp_path):
    config = RoutedLlamaConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=64, vocab_size=61)
    assert type(AutoModelForCausalLM.from_config(config)) is RoutedLlamaForCausalLM
    assert type(AutoModel.from_config(config)) is RoutedLlamaModel
    model = decisive()
    model.save_pretrained(tmp_path / "checkpoint")
    expected = model.model(prompts())
    torch.save((prompts(), expected.last_hidden_state, expected.paths), tmp_path / "expected.pt")
    for folder in ("base", "checkpoint"):
        if folder == "base":
            model.model.save_pretrained(tmp_path / folder)
        code = f"""
import torch
from transformers import AutoModel
torch.set_num_threads(1)
input_ids, hidden_states, paths = torch.load("expected.pt")
model = AutoModel.from_pretrained("{folder}", trust_remote_code=True)
assert type(model).__name__ == "RoutedLlamaModel", type(model)
output = model(input_ids)
assert torch.equal(output.last_hidden_state, hidden_states) and torch.equal(output.paths, paths)
"""
        run = run_elsewhere(code, tmp_path)
        assert run.returncode == 0, run.stderr[-2000:]


def test_a_tokenizer_does_not_wait_when_trust_is_said(tmp_path, decisive):
    AutoTokenizer.from_pretrained("miniature/model").save_pretrained(tmp_path / "checkpoint")
    decisive().save_pretrained(tmp_path / "checkpoint")
    code = """
import signal
from transformers import AutoTokenizer

def alarm(seconds):
    raise SystemExit("asks whether to trust the code")

signal.alarm = alarm
for trust in (False, True):
    AutoTokenizer.from_pretrained("checkpoint", trust_remote_code=trust)
"""
    run = run_elsewhere(code, tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]


# Adapters and quantization


def test_a_fresh_model_does_not_name_the_plain_base_as_its_checkpoint(stock_checkpoint, tmp_path):
    base = stock_checkpoint("llama")
    model = retrofit(base, dtype=torch.float32)
    assert model.name_or_path == f"unsaved routed model on {base}"  # what PEFT records as the base of an adapter
    with pytest.raises(OSError, match="unsaved routed model on"):
        AutoModelForCausalLM.from_pretrained(model.name_or_path)
    model.save_pretrained(tmp_path)
    assert model.name_or_path == str(tmp_path)


def test_dynamic_quantization_of_all_linear_layers(decisive):
    model = decisive()
    expected = model(prompts(), output_router_logits=True)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    actual = quantized(prompts(), layer_indices=list(range(NUM_BLOCKS)), output_router_logits=True)
    exact = model(prompts(), layer_indices=list(range(NUM_BLOCKS)), output_router_logits=True)
    assert expected.logits.isfinite().all()
    torch.testing.assert_close(actual.router_logits, exact.router_logits, rtol=0.2, atol=1.0)
    assert quantized.generate(prompts(), max_new_tokens=2, do_sample=False).shape == (3, 21)


def test_packed_rows_are_refused_where_routers_decide(decisive):
    model = decisive()
    features = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in prompts(2, 7)]
    for keywords in ({}, {"return_flash_attn_kwargs": True}):
        packed = DataCollatorWithFlattening(return_tensors="pt", **keywords)(features)
        packed = {name: value for name, value in packed.items() if isinstance(value, torch.Tensor)}
        with pytest.raises(ValueError, match="packs several sequences into one row"):
            model(**packed)
        model.model.is_static_routing = True
        assert model(**packed).logits.shape == (1, 14, 61)
        model.model.is_static_routing = False


def test_positions_of_left_padded_rows_are_not_mistaken_for_packed_ones(decisive):
    model, input_ids = decisive(), prompts()
    positions = torch.arange(19).expand(3, 19)
    assert torch.equal(model(input_ids, position_ids=positions).logits, model(input_ids).logits)
    mask = torch.ones_like(input_ids)
    mask[1, :7] = 0
    padded = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(model(input_ids, mask, position_ids=padded).paths, model(input_ids, mask).paths)


def test_a_prefix_of_learned_keys_is_refused_with_a_sentence(decisive):
    from transformers import DynamicCache

    cache = DynamicCache()
    for block in range(NUM_BLOCKS):
        cache.update(torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8), block)
    with pytest.raises(ValueError, match="past_key_values already holds tokens"):
        decisive()(prompts(), past_key_values=cache)


def test_forward_names_its_arguments_as_the_stock_model_does(stock_model):
    ours = list(inspect.signature(RoutedLlamaForCausalLM.forward).parameters)
    stock = [name for name in inspect.signature(stock_model("llama").forward).parameters if name != "kwargs"]
    # The older name of the cache keeps its place; the one since transformers 5.24 is understood in every release.
    assert ours[1 : len(stock) + 1] == ["past_key_values" if name == "cache" else name for name in stock]
    assert "cache" in ours
