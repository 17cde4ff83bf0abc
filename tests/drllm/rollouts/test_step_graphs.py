"""Decoding from graphs of a whole step. What a GPU captures runs here as it is, on the same fixed buffers."""

import pytest
import torch

from data_models import load_path_model
from drllm.rollouts import step_graphs
from drllm.rollouts.engine import Request, RolloutEngine
from drllm.rollouts.step_graphs import DecodingSteps
from tests import search_toys
from tests.drllm.rollouts.test_engine import EDGES, NUM_BLOCKS, random_paths
from train_models.paths import default_path


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def toy(request, tmp_path_factory, stock_model, stock_checkpoint):
    """(model, tokenizer, prompts) of a family."""
    folder = tmp_path_factory.mktemp("toy")
    base = search_toys.make_model(folder / "model", stock_model)
    model, tokenizer = search_toys.load(base)
    if request.param != "llama":
        vocabulary = len(search_toys.VOCABULARY)
        model = load_path_model(stock_checkpoint(request.param, vocab_size=vocabulary), dtype=torch.float32)
    return model, tokenizer, search_toys.prompts(search_toys.make_data(folder / "data", 6, seed=3), tokenizer)


class Captures:
    """Stands in for `CudaCapture`: keeps the function, and runs it before, as a warm-up does."""

    def __init__(self, broken: str = ""):
        self.count, self.broken = 0, broken

    def __call__(self, function):
        self.count += 1
        if self.broken == "capture":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        function()
        if self.broken == "replay":
            return lambda: None  # the states of the warm-up
        return function


def engines(toy, capture, batch_size=64):
    """(the engine that launches steps, one that replays them)."""
    model, tokenizer, _ = toy
    plain, replaying = (RolloutEngine(model, tokenizer, batch_size) for _ in range(2))
    replaying.steps = DecodingSteps(model, capture)
    return plain, replaying


def cases(toy) -> list[Request]:
    prompts = toy[2]
    pairs = list(zip(prompts * 2, EDGES + random_paths(2 * len(prompts) - len(EDGES), 0), strict=True))
    return [Request(prompt, path, to_the_end=True) for prompt, path in pairs]


@pytest.mark.parametrize("batch_size", [7, 64])
def test_replayed_steps_give_the_tokens_of_launched_ones(toy, batch_size, monkeypatch, capsys):
    monkeypatch.setattr(step_graphs, "ROWS", 8)
    monkeypatch.setattr(step_graphs, "LENGTHS", 16)
    capture = Captures()
    plain, replaying = engines(toy, capture, batch_size)
    requests = cases(toy)
    assert len({len(request.prompt.input_ids) for request in requests}) > 5, "there is padding"
    defaults = [Request(request.prompt, default_path(NUM_BLOCKS)) for request in requests[::3]]
    for some in (defaults, requests, requests[::-1]):  # the second time buffers hold what other batches left
        expected = plain.respond(some)
        assert replaying.respond(some) == expected
    assert len({rollout.response for rollout in expected}) > 5
    assert replaying.block_tokens <= plain.block_tokens
    assert not replaying.steps.is_refused
    assert "one by one" not in capsys.readouterr().err
    before = capture.count
    replaying.respond(requests)
    assert capture.count == before, "known shapes are captured once"


def test_only_so_many_shapes_are_kept(toy, monkeypatch):
    monkeypatch.setattr(step_graphs, "ROWS", 1)
    monkeypatch.setattr(step_graphs, "MOST_SHAPES", 2)
    _, replaying = engines(toy, Captures())
    for rows in (5, 4, 3, 2):  # the largest first: buffers that grow drop all shapes
        replaying.respond(cases(toy)[:rows])
    assert replaying.steps.captures == 4
    assert len(replaying.steps._shapes) <= 2


def test_what_an_earlier_batch_left_does_not_matter(toy):
    plain, replaying = engines(toy, Captures())
    requests = cases(toy)
    expected = plain.respond(requests)
    replaying.respond(requests)
    with torch.inference_mode():
        for entries in replaying.steps._entries:
            entries.fill_(float("nan"))
    assert replaying.respond(requests) == expected


@pytest.mark.parametrize("broken", ["capture", "replay"])
def test_steps_that_fail_or_differ_are_launched_as_usual(toy, broken, capsys, monkeypatch):
    plain, replaying = engines(toy, Captures(broken))
    requests = cases(toy)
    decode = RolloutEngine._decode

    def checked(self, active, ended, tokens, mask, is_padded, cache):
        assert cache.tokens_seen == mask.shape[1], "the step that was compared is taken back"
        decode(self, active, ended, tokens, mask, is_padded, cache)

    monkeypatch.setattr(RolloutEngine, "_decode", checked)
    expected = plain.respond(requests)
    for _ in range(2):
        assert replaying.respond(requests) == expected
    reasons = {"capture": "operation not permitted when stream is capturing\n", "replay": "its logits differ by"}
    message = capsys.readouterr().err
    assert message.count("decoding steps are launched one by one, since a captured one failed: ") == 1
    assert reasons[broken] in message
    assert "more" not in message
    assert all(not entries.numel() for entries in replaying.steps._entries), "the memory is given back"


def test_no_memory_for_the_buffers_halves_the_batch(toy, monkeypatch, capsys):
    plain, replaying = engines(toy, Captures())
    requests = cases(toy)
    expected, tries = plain.respond(requests), []
    start = DecodingSteps.start

    def full(self, cache, *arguments):
        tries.append(cache.schedule.batch_size)
        if tries[-1] > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return start(self, cache, *arguments)

    monkeypatch.setattr(DecodingSteps, "start", full)
    assert replaying.respond(requests) == expected
    assert max(tries) > 10
    assert "out of memory at" in capsys.readouterr().err
    assert not replaying.steps.is_refused


def test_a_cpu_launches_steps(toy):
    model, tokenizer, _ = toy
    assert DecodingSteps.of(model) is None
    assert RolloutEngine(model, tokenizer, 4).steps is None
