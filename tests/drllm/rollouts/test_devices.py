"""What a search finds on a GPU and on a CPU: in float32 the same, in bfloat16 within stated bounds.

The CPU's cases show that the comparison itself works; the GPU's run with `make test-gpu`.
"""

import copy

import pytest
import torch

from data_models import load_path_model
from drllm.checkpoints import load_routed, load_tokenizer
from drllm.labels import Example
from drllm.miniature import MINIATURE_DATA, MINIATURE_MODEL
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.questions.prompts import Prompt
from drllm.questions.sets import load_questions
from drllm.rollouts.batches import MOST_ROWS, limit_on
from drllm.rollouts.engine import Request, RolloutEngine
from drllm.rollouts.likelihood import LikelihoodEngine
from drllm.rollouts.routed_paths import routed_paths, router_windows
from drllm.search.pool import SearchPool
from drllm.search.tree import SearchSettings
from tests import search_toys

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FAMILIES = ["llama", "qwen2", "qwen3", "miniature"]
QUESTIONS = 6


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory, stock_checkpoint, stock_model):
    """(folder of the model, tokenizer, questions of ARC, questions of both kinds)."""
    if request.param == "miniature":
        folder, data = MINIATURE_MODEL, MINIATURE_DATA
        tokenizer = load_tokenizer(str(folder))
    else:
        toy = tmp_path_factory.mktemp(request.param)
        base = search_toys.make_model(toy / "base", stock_model)
        folder = stock_checkpoint(request.param, vocab_size=len(search_toys.VOCABULARY))
        tokenizer, data = load_tokenizer(str(base)), search_toys.make_data(toy / "data", QUESTIONS, seed=2)
    arc = load_questions("arc_easy", "train", data)[:QUESTIONS]
    return str(folder), tokenizer, arc, [*arc, *load_questions("dart-1", "train", data)[:QUESTIONS]]


def searched(engine, prompts) -> dict:
    pool = SearchPool(engine, SearchSettings(num_simulations=10), 0, 64)
    return {one.prompt.question.id: (one.result, one.base_response, one.path_response) for one in pool.search(prompts)}


def edited_paths(blocks: int) -> list[tuple[int, ...]]:
    default = [1] * blocks
    return [(*default[:at], visits, *default[at + 1 :]) for at in range(blocks) for visits in (0, 2)]


@pytest.mark.parametrize("device", DEVICES)
def test_float32_finds_the_same_labels_and_responses(case, device):
    folder, tokenizer, _, questions = case
    prompts = [Prompt.of(question, tokenizer, chat=False) for question in questions]
    model = load_path_model(folder, dtype=torch.float32)
    expected = searched(RolloutEngine(copy.deepcopy(model), tokenizer, 5), prompts)
    model.to(device)
    limit = limit_on(model, [(prompt.total_tokens, 1) for prompt in prompts])
    assert limit.rows == (128 if device == "cpu" else MOST_ROWS)
    engine = RolloutEngine(model, tokenizer, limit)
    assert searched(engine, prompts) == expected
    assert (engine.steps is None) == (device == "cpu")
    assert engine.steps is None or not engine.steps.is_refused


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_log_likelihoods_agree(case, device, dtype, bound):
    """`bound`: nats per scored token, relative to one nat."""
    folder, tokenizer, questions, _ = case
    prompts = [LikelihoodPrompt.of(question, tokenizer) for question in questions]
    exact, model = load_path_model(folder, dtype=torch.float32), load_path_model(folder, dtype=dtype).to(device)
    paths = edited_paths(exact.config.num_hidden_layers)
    requests = [Request(prompt, path) for prompt in prompts for path in paths]
    expected = LikelihoodEngine(exact, tokenizer, 7).score(requests)
    found = LikelihoodEngine(model, tokenizer, 64).score(requests)
    for request, ours, theirs in zip(requests, found, expected, strict=True):
        for scored, one, other in zip(request.prompt.scored, ours, theirs, strict=True):
            assert abs(one - other) <= bound * max(scored, abs(other))


@pytest.mark.parametrize("device", DEVICES)
def test_routers_read_and_decide_the_same(case, device):
    folder, tokenizer, _, questions = case
    prompts = [Prompt.of(question, tokenizer, chat=False) for question in questions]
    routed = load_routed(folder, torch.float32, None, {}).eval()
    routed.model.init_routers(seed=0)
    examples = [Example(p.question.id, p.input_ids, (1,) * routed.config.num_hidden_layers) for p in prompts]
    windows, mask = router_windows(routed, examples, 3, title=None)
    paths = routed_paths(routed, prompts, 3)
    routed.to(device)
    found, found_mask = router_windows(routed, examples, 64, title=None)
    torch.testing.assert_close(found, windows, rtol=1e-4, atol=1e-4)
    assert torch.equal(found_mask, mask)
    assert routed_paths(routed, prompts, 64) == paths
