"""What a call needs to know travels with its arguments and its cache: threads, assistants, guidance, checkpointing."""

import copy
import pickle
import threading

import pytest
import torch
from transformers import CompileConfig

from train_models import PathCache
from train_models.cache import CACHE_NAME

GREEDY = {"do_sample": False, "pad_token_id": 0}


def prompts(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 61, (count, length), generator=torch.Generator().manual_seed(seed))


def looked_up(length: int = 8, seed: int = 0) -> torch.Tensor:
    """A prompt that repeats itself, so that the lookup finds candidates from the first pass on."""
    return prompts(1, length, seed).repeat(1, 2)


class Beside:
    """Runs `action` in another thread, again and again, while the body runs."""

    def __init__(self, action):
        self._action, self._stop, self.calls = action, threading.Event(), 0
        self._thread = threading.Thread(target=self._work)

    def _work(self):
        while not self._stop.is_set():
            self._action()
            self.calls += 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        assert self.calls


@pytest.fixture
def inside_assisted(monkeypatch):
    """(model, action): `action` runs once within each forward pass of assisted decoding, as another thread would."""

    def install(model, action):
        is_running = []

        def hook(*_):
            if not is_running:
                is_running.append(True)
                action()
                is_running.clear()

        return model.model.register_forward_pre_hook(hook)

    return install


# Threads


@pytest.mark.parametrize("kind", ["lookup", "assistant"])
def test_a_call_within_assisted_decoding_decides_on_its_own_prompt(kind, decisive, stock_model, inside_assisted):
    model, long_prompt = decisive(), prompts(1, 20, seed=3)
    expected = model.generate(long_prompt, max_new_tokens=3, **GREEDY)
    short = prompts(1, 7, seed=1)
    assert not torch.equal(model(long_prompt).paths, model(long_prompt[:, :7]).paths)
    arguments = {"prompt_lookup_num_tokens": 3} if kind == "lookup" else {"assistant_model": stock_model("llama")}
    found = []
    hook = inside_assisted(model, lambda: found.append(model.generate(long_prompt, max_new_tokens=3, **GREEDY)))
    tokens = model.generate(short, max_new_tokens=8, **arguments, **GREEDY)
    hook.remove()
    assert torch.equal(tokens, model.generate(short, max_new_tokens=8, **GREEDY))
    assert len(found) > 1
    assert all(torch.equal(other, expected) for other in found)


def test_threads_with_assisted_decoding_do_not_disturb_each_other(decisive):
    model, long_prompt = decisive(), prompts(1, 20, seed=3)
    expected = model.generate(long_prompt, max_new_tokens=4, **GREEDY)
    short = prompts(1, 7, seed=1)
    with Beside(lambda: model.generate(short, max_new_tokens=30, prompt_lookup_num_tokens=3, **GREEDY)):
        found = [model.generate(long_prompt, max_new_tokens=4, **GREEDY) for _ in range(8)]
    assert all(torch.equal(tokens, expected) for tokens in found)


def test_a_call_within_a_compiled_step_counts_its_own_passes(decisive, inside_assisted):
    model, other_prompt = decisive(), prompts(1, 20, seed=3)
    expected = model.generate(other_prompt, max_new_tokens=4, **GREEDY)
    compiled = CompileConfig(mode="default", backend="eager", fullgraph=False)
    compiled._compile_all_devices = True
    arguments = {"max_new_tokens": 4, "cache_implementation": "static", "compile_config": compiled}
    short = prompts(1, 7, seed=1)
    tokens = model.generate(short, **arguments, **GREEDY)
    found = []
    call = model.get_compiled_call(compiled)

    def nested(**inputs):
        found.append(model.generate(other_prompt, max_new_tokens=4, **GREEDY))
        return call(**inputs)

    model.get_compiled_call = lambda _config: nested
    assert torch.equal(model.generate(short, **arguments, **GREEDY), tokens)
    del model.get_compiled_call
    with Beside(lambda: model.generate(short, **arguments, **GREEDY)):
        found += [model.generate(other_prompt, max_new_tokens=4, **GREEDY) for _ in range(12)]
    assert all(torch.equal(other, expected) for other in found)


def test_block_applications_are_those_of_the_thread_that_asks(decisive):
    model = decisive()
    rows = {length: prompts(1, length, seed=length) for length in (7, 20)}
    expected = {}
    for length, row in rows.items():
        model.generate(row, max_new_tokens=length, **GREEDY)
        expected[length] = model.block_applications.tolist()
    assert expected[7] != expected[20]
    found, barrier = {7: [], 20: []}, threading.Barrier(2)

    def work(length):
        for _ in range(5):
            barrier.wait()
            model.generate(rows[length], max_new_tokens=length, **GREEDY)
            barrier.wait()
            found[length].append(model.block_applications.tolist())

    threads = [threading.Thread(target=work, args=(length,)) for length in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {length: [count] * 5 for length, count in expected.items()}


def test_block_applications_travel_with_the_cache_and_reach_a_thread_that_only_waits(decisive):
    model, prompt = decisive(), prompts(1, 9)
    outputs = []
    arguments = {"max_new_tokens": 4, "return_dict_in_generate": True}
    worker = threading.Thread(target=lambda: outputs.append(model.generate(prompt, **arguments, **GREEDY)))
    worker.start()
    worker.join()
    (output,) = outputs
    cache = output[CACHE_NAME]
    assert cache.block_applications.tolist() == [4 * sum(cache.paths[0])]
    assert model.block_applications.tolist() == cache.block_applications.tolist()
    with pytest.raises(RuntimeError, match="no forward pass"):
        _ = PathCache(model.config).block_applications
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match="no forward pass"):
            _ = clone.block_applications


# Assistants


def test_an_assistant_is_not_asked_to_follow_the_path(decisive, stock_model):
    model, prompt = decisive(), prompts(1, 9)
    for assistant in (stock_model("llama"), decisive()):
        for arguments in ({"layer_indices": [0, 1, 1, 3]}, {"prompt_length": [5]}):
            expected = model.generate(prompt, max_new_tokens=6, **arguments, **GREEDY)
            actual = model.generate(prompt, max_new_tokens=6, assistant_model=assistant, **arguments, **GREEDY)
            assert torch.equal(actual, expected)


def test_embeddings_with_prompt_lookup_decide_on_all_of_them(decisive):
    model, prompt = decisive(), prompts(2, 9)[:1]
    embeddings = model.get_input_embeddings()(prompt)
    expected = model.generate(inputs_embeds=embeddings, max_new_tokens=6, **GREEDY)
    actual = model.generate(inputs_embeds=embeddings, prompt_lookup_num_tokens=3, max_new_tokens=6, **GREEDY)
    assert torch.equal(actual, expected)


def test_a_second_turn_with_assisted_decoding_is_refused(decisive):
    model, cache = decisive(), PathCache()
    first = model.generate(prompts(1, 9), max_new_tokens=4, past_key_values=cache, **GREEDY)
    turn = torch.cat([first, prompts(1, 5, seed=2)], dim=1)
    with pytest.raises(ValueError, match="assisted decoding sends the whole prompt again"):
        model.generate(turn, max_new_tokens=4, past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)
    model.generate(turn, max_new_tokens=4, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache_are_understood(name, decisive):
    model, prompt = decisive(), prompts(2, 9)
    expected = model.generate(prompt, max_new_tokens=8, **GREEDY)
    cache = PathCache()
    first = model.generate(prompt, max_new_tokens=4, **{name: cache}, **GREEDY)
    mask = torch.ones_like(first)  # or generated tokens with the number of padding would be taken for padding
    second = model.generate(first, attention_mask=mask, max_new_tokens=4, **{name: cache}, **GREEDY)
    assert torch.equal(second, expected)
    assert cache.get_seq_length() == 16
    output = model(prompt, **{name: PathCache()})
    assert output[CACHE_NAME].get_seq_length() == 9
    with pytest.raises(ValueError, match="two names of one argument"):
        model(prompt, cache=PathCache(), past_key_values=PathCache())


# Guidance


def test_guidance_is_the_same_with_and_without_a_cache(decisive):
    model = decisive()
    for seed in range(4):
        prompt, negative = prompts(1, 13, seed), prompts(1, 5, seed + 50)
        arguments = {"guidance_scale": 3.0, "negative_prompt_ids": negative, "max_new_tokens": 12, **GREEDY}
        cached = model.generate(prompt, **arguments)
        assert torch.equal(model.generate(prompt, use_cache=False, **arguments), cached)
        assert torch.equal(model.generate(prompt, use_cache=False, **arguments), cached), "nothing is left behind"


# Gradient checkpointing


def test_generating_in_train_mode_under_gradient_checkpointing_is_right_or_refused(decisive):
    model, prompt = decisive(), prompts(2, 13)
    expected = model.generate(prompt, max_new_tokens=5, **GREEDY)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.eval().generate(prompt, max_new_tokens=5, **GREEDY), expected)
    model.train()
    assert torch.equal(model.generate(prompt, max_new_tokens=5, use_cache=False, **GREEDY), expected)
    if CACHE_NAME == "cache":  # since 5.24 blocks keep their cache where no gradient is computed
        assert torch.equal(model.generate(prompt, max_new_tokens=5, **GREEDY), expected)
    else:
        with pytest.raises(ValueError, match="gradient checkpointing drops the cache in train mode"):
            model.generate(prompt, max_new_tokens=5, **GREEDY)
    with pytest.raises(ValueError, match="gradient checkpointing drops the cache in train mode"):
        model(prompt, past_key_values=PathCache())
    assert torch.equal(model(prompt).paths, model.eval()(prompt).paths)  # where no cache is asked for


# Prompt and answer in one pass


def test_leading_labels_of_minus_100_are_the_prompt(decisive, caplog):
    model, rows = decisive(), prompts(6, 19)
    lengths = [4, 9, 14, 1, 18, 11]
    labels = rows.clone()
    mask = torch.ones_like(rows)
    for row, length in enumerate(lengths):
        labels[row, :length] = -100
    labels[2, 16] = -100  # a gap in the answer is not prompt
    mask[4, :6] = 0
    expected = model(rows, mask, prompt_length=torch.tensor(lengths) - torch.tensor([0, 0, 0, 0, 6, 0]))
    actual = model(rows, mask, labels=labels)
    assert torch.equal(actual.paths, expected.paths)
    assert not torch.equal(model(rows, mask).paths, expected.paths)
    explicit = model(rows, mask, labels=labels, prompt_length=[2] * 6)
    assert torch.equal(explicit.paths, model(rows, mask, prompt_length=[2] * 6).paths)
    taught = model(rows, mask, labels=labels, layer_indices=[0, 1], output_router_logits=True)
    windows = model(rows, mask, prompt_length=expected.paths.new_tensor([4, 9, 14, 1, 12, 11]), layer_indices=[0, 1],
                    output_router_logits=True)  # fmt: skip
    assert torch.equal(taught.router_logits, windows.router_logits)
    assert "prompt" not in caplog.text


def test_where_nothing_says_what_the_prompt_is_one_warning_does(decisive, caplog):
    model, rows = decisive(), prompts(3, 19)
    whole = model(rows)
    model(rows, labels=rows, layer_indices=[0, 1])
    model.generate(rows, max_new_tokens=2, **GREEDY)
    model.generate(looked_up(), max_new_tokens=4, prompt_lookup_num_tokens=3, **GREEDY)
    assert "prompt_length" not in caplog.text
    calls = (
        lambda: model(rows, labels=rows),
        lambda: model(rows, logits_to_keep=8),
        lambda: model.train().model(rows),  # as a trainer that computes the logits itself
    )
    for call in calls:
        model.model._has_noted_prompt = False
        for _ in range(2):
            assert torch.equal(call().paths, whole.paths)
        assert caplog.text.count("pass prompt_length or prompt_mask") == 1
        caplog.clear()
