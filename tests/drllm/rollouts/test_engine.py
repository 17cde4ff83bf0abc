"""The rollout engine against stock `generate`, one rollout at a time."""

import copy
import random

import pytest
import torch
from tokenizers import processors

from data_models import load_path_model
from drllm.errors import UserError
from drllm.questions.grading import grade
from drllm.questions.prompts import Prompt, render_prompt
from drllm.rollouts.default_states import DefaultStates
from drllm.rollouts.engine import Request, RolloutEngine
from drllm.search.pool import SearchPool
from drllm.search.tree import PathSearch, SearchSettings, question_seed
from tests import search_toys
from train_models.paths import default_path, is_allowed, path_to_layer_indices

NUM_BLOCKS = 6


@pytest.fixture(scope="module")
def toy(tmp_path_factory, stock_model):
    """(model, tokenizer, prompts)."""
    folder = tmp_path_factory.mktemp("toy")
    model, tokenizer = search_toys.load(search_toys.make_model(folder / "model", stock_model))
    return model, tokenizer, search_toys.prompts(search_toys.make_data(folder / "data", 6, seed=3), tokenizer)


def alone(model, tokenizer, prompt: Prompt, path) -> str:
    """The response by stock `generate`, batch 1."""
    ids = torch.tensor([prompt.input_ids])
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        layer_indices=path_to_layer_indices(path),
        max_new_tokens=prompt.max_new_tokens,
        do_sample=False,
        pad_token_id=2,
    )
    return tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)


def random_paths(count: int, seed: int) -> list[tuple[int, ...]]:
    choose = random.Random(seed)
    paths = (tuple(choose.choices((0, 1, 2), (1, 4, 1), k=NUM_BLOCKS)) for _ in iter(int, 1))
    allowed = (path for path in paths if is_allowed(path) and path != default_path(NUM_BLOCKS))
    return [path for path, _ in zip(allowed, range(count), strict=False)]


EDGES = [(0, 0, 1, 1, 1, 1), (2, 1, 1, 1, 1, 1), (1, 1, 1, 1, 0, 0), (2,) * 6, (1, 1, 1, 1, 1, 2), (1, 1, 1, 1, 1, 1)]


@pytest.mark.parametrize("stride", [0, 1, 4])
@pytest.mark.parametrize("batch_size", [7, 64])
def test_batched_responses_equal_stock_generate_alone(toy, stride, batch_size):
    """`stride`: of the default path's states that rollouts start from; 0: they start at block 0."""
    model, tokenizer, prompts = toy
    assert len({len(prompt.input_ids) for prompt in prompts}) > 5  # so that there is padding
    engine = RolloutEngine(model, tokenizer, batch_size, reuse_default_states=stride > 0)
    engine._default_states = DefaultStates(stride)
    engine.respond([Request(prompt, default_path(NUM_BLOCKS)) for prompt in prompts[::2]])  # half have known states
    cases = [(prompt, path) for prompt, path in zip(prompts * 2, EDGES + random_paths(30, 0), strict=True)]
    rollouts = engine.respond([Request(prompt, path, to_the_end=True) for prompt, path in cases])
    expected = [alone(model, tokenizer, prompt, path) for prompt, path in cases]
    assert [rollout.response for rollout in rollouts] == expected
    assert len(set(expected)) > 10  # the toy says different things
    rewards = [grade(prompt.question, response) for (prompt, _), response in zip(cases, expected, strict=True)]
    assert [rollout.is_right for rollout in rollouts] == rewards
    assert True in rewards
    assert False in rewards


def test_a_base_that_overflows_is_an_error_and_an_edited_path_a_wrong_answer(toy):
    model, tokenizer, prompts = toy
    overflowing = copy.deepcopy(model)
    with torch.no_grad():
        overflowing.lm_head.weight.fill_(3e38)
    engine = RolloutEngine(overflowing, tokenizer, 4)
    edited = Request(prompts[0], EDGES[0])
    assert not engine.respond([edited])[0].is_right
    with pytest.raises(
        UserError, match=rf"question {prompts[1].question.id}: the logits along the path 111111 are NaN"
    ):
        engine.respond([edited, Request(prompts[1], default_path(NUM_BLOCKS))])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families_give_the_same_responses_batched_and_alone(toy, stock_checkpoint, family):
    _, tokenizer, prompts = toy
    vocabulary = len(search_toys.VOCABULARY)
    model = load_path_model(stock_checkpoint(family, vocab_size=vocabulary), dtype=torch.float32)
    engine = RolloutEngine(model, tokenizer, batch_size=16)
    engine.respond([Request(prompt, default_path(NUM_BLOCKS)) for prompt in prompts])
    cases = list(zip(prompts, random_paths(18, 1), strict=True))
    rollouts = engine.respond([Request(prompt, path, to_the_end=True) for prompt, path in cases])
    expected = [
        # The stock checkpoint has no end token: `generate` runs to the limit, the engine to the tokenizer's.
        alone(model, tokenizer, prompt, path)
        for prompt, path in cases
    ]
    for rollout, response in zip(rollouts, expected, strict=True):
        assert response.startswith(rollout.response)


def test_rows_leave_once_settled_and_are_worth_the_same(toy):
    model, tokenizer, prompts = toy
    requests = [(prompt, path) for prompt in prompts for path in random_paths(3, 2)]
    short = RolloutEngine(model, tokenizer, 32).respond([Request(*request) for request in requests])
    full = RolloutEngine(model, tokenizer, 32).respond([Request(*request, to_the_end=True) for request in requests])
    assert [rollout.is_right for rollout in short] == [rollout.is_right for rollout in full]
    assert all(long.response.startswith(cut.response) for cut, long in zip(short, full, strict=True))
    assert sum(len(cut.response) < len(long.response) for cut, long in zip(short, full, strict=True)) > 5


def test_known_default_states_save_the_blocks_below_the_first_edit(toy):
    model, tokenizer, prompts = toy
    costs = {}
    for reuse in (True, False):
        engine = RolloutEngine(model, tokenizer, 64, reuse_default_states=reuse)
        engine.respond([Request(prompt, default_path(NUM_BLOCKS)) for prompt in prompts])
        before = engine.block_tokens
        engine.respond([Request(prompt, (1, 1, 1, 1, 0, 2)) for prompt in prompts])
        costs[reuse] = engine.block_tokens - before
    prompt_tokens = sum(len(prompt.input_ids) for prompt in prompts)
    assert costs[False] - costs[True] == 4 * prompt_tokens
    engine.forget(prompts[0].question)
    assert prompts[0].question.id not in engine._default_states.places


def test_a_batch_that_runs_out_of_memory_is_halved_and_changes_nothing(toy, capsys, monkeypatch):
    model, tokenizer, prompts = toy
    requests = [Request(prompt, path) for prompt, path in zip(prompts, random_paths(18, 3), strict=True)]
    expected = RolloutEngine(model, tokenizer, 16).respond(requests)
    engine = RolloutEngine(model, tokenizer, 16)
    forward = type(model).forward

    def small_memory(self, *args, inputs_embeds=None, **kwargs):
        if inputs_embeds is not None and len(inputs_embeds) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, *args, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(type(model), "forward", small_memory)
    assert engine.respond(requests) == expected
    said = (
        "out of memory at 9 rows per batch: continuing with 4\nout of memory at 4 rows per batch: continuing with 2\n"
    )
    assert capsys.readouterr().err == said
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("out")))
    with pytest.raises(UserError, match=r"one prompt of \d+ tokens runs out of memory"):
        engine.respond(requests)


def test_one_row_out_of_memory_is_tried_again_without_stored_states(toy, monkeypatch):
    model, tokenizer, prompts = toy
    request = Request(prompts[0], (1, 1, 1, 0, 1, 1))
    engine = RolloutEngine(model, tokenizer, 16)
    expected = engine.respond([request])
    engine.respond([Request(prompt, default_path(NUM_BLOCKS)) for prompt in prompts])
    run, tries = engine._run, []

    def full(batch):
        tries.append(len(engine._default_states.places))
        if engine._default_states.places:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        run(batch)

    monkeypatch.setattr(engine, "_run", full)
    assert engine.respond([request]) == expected
    assert tries == [len(prompts), 0]
    monkeypatch.setattr(engine, "_run", run)
    engine.respond([Request(prompt, default_path(NUM_BLOCKS)) for prompt in prompts])
    twice = iter([torch.OutOfMemoryError("out")] * 2)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: (_ for _ in ()).throw(next(twice)))
    with pytest.raises(UserError, match=r"one prompt of \d+ tokens runs out of memory"):
        engine.respond([request])


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_what_counts_as_out_of_memory(toy, monkeypatch, message, is_memory):
    model, tokenizer, prompts = toy
    requests = [Request(prompt, default_path(NUM_BLOCKS)) for prompt in prompts[:4]]
    expected = RolloutEngine(model, tokenizer, 4).respond(requests)
    engine = RolloutEngine(model, tokenizer, 4)
    run = engine._run

    def small_memory(batch):
        if len(batch) > 2:
            raise RuntimeError(message)
        run(batch)

    monkeypatch.setattr(engine, "_run", small_memory)
    if is_memory:
        assert engine.respond(requests) == expected
        assert engine.batch_size == 2
    else:
        with pytest.raises(RuntimeError, match="assert triggered"):
            engine.respond(requests)


def by_id(searched):
    return {one.prompt.question.id: (one.result, one.base_response, one.path_response) for one in searched}


def test_searches_do_not_depend_on_what_runs_beside_them(toy):
    model, tokenizer, prompts = toy
    settings = SearchSettings(num_simulations=6)
    expected = by_id(SearchPool(RolloutEngine(model, tokenizer, 64), settings, 0, 64).search(prompts))
    assert len(expected) == len(prompts)
    assert {result.kind for result, *_ in expected.values()} == {None, "shorter", "wrong_to_right"}
    for batch_size, concurrency, reuse, order in ((1, 1, True, 1), (5, 9, True, -1), (16, 3, False, -1)):
        engine = RolloutEngine(model, tokenizer, batch_size, reuse_default_states=reuse)
        found = by_id(SearchPool(engine, settings, 0, concurrency).search(prompts[::order]))
        assert found == expected
        assert not engine._default_states.places
        assert not engine._settled
        assert not engine._graded
        # Nothing is computed twice: one rollout a distinct path of a question.
        assert engine.rollouts == sum(result.inferences for result, *_ in expected.values())
    assert by_id(SearchPool(RolloutEngine(model, tokenizer, 64), settings, 1, 64).search(prompts)) != expected


def test_batched_searches_equal_the_published_way(toy):
    model, tokenizer, prompts = toy
    settings = SearchSettings(num_simulations=6)
    searched = by_id(SearchPool(RolloutEngine(model, tokenizer, 32), settings, 0, 32).search(prompts))
    for prompt in prompts[::4]:
        search = PathSearch(NUM_BLOCKS, settings, question_seed(0, prompt.question.id))
        while search.request is not None:
            response = alone(model, tokenizer, prompt, search.request)
            search.tell(float(grade(prompt.question, response)))
        assert searched[prompt.question.id][0] == search.result()


def test_unwanted_searches_end_after_the_default_path(toy):
    model, tokenizer, prompts = toy
    engine, settings = RolloutEngine(model, tokenizer, 32), SearchSettings(num_simulations=10)
    pool = SearchPool(engine, settings, 0, 32, is_wanted=lambda prompt, base_correct: not base_correct)
    for one in pool.search(prompts):
        assert one.result.inferences == 1 or not one.result.base_correct
        if one.result.base_correct:
            assert (one.result.simulations, one.result.kind) == (0, None)
            assert one.path_response == one.base_response


def test_questions_are_read_as_there_is_room(toy):
    model, tokenizer, prompts = toy
    read = []

    def reading():
        for prompt in prompts:
            read.append(prompt)
            yield prompt

    engine = RolloutEngine(model, tokenizer, 4)
    searched = SearchPool(engine, SearchSettings(num_simulations=5), 0, 8).search(reading())
    next(searched)
    assert len(read) == 8
    assert len(engine._default_states.places) <= 8
    list(searched)
    assert len(read) == len(prompts)


def test_prompts_are_tokenised_as_at_evaluation(toy):
    _, tokenizer, prompts = toy
    prompt = prompts[0]
    assert prompt.text == render_prompt(prompt.question)
    assert list(prompt.input_ids) == tokenizer(prompt.text)["input_ids"]
    assert prompt.max_new_tokens == 2


@pytest.mark.parametrize("begin", ["", "<s> "], ids=["no BOS in the template", "BOS in the template"])
def test_chat_prompts_begin_with_one_bos(toy, begin):
    _, tokenizer, prompts = toy
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = begin + "w1 {{ messages[0]['content'] }} w2"
    for prompt in prompts[::6]:
        tokens = Prompt.of(prompt.question, tokenizer, chat=True).input_ids
        assert tokens[0] == tokenizer.bos_token_id
        assert tokens.count(tokenizer.bos_token_id) == 1
        assert Prompt.of(prompt.question, tokenizer, chat=False).input_ids == (tokens[0], *prompt.input_ids)
