"""The log-likelihood reward: packed rows score as each option alone does, and as lm-eval scores it."""

import json
import random

import pytest
import torch
from lm_eval.api.instance import Instance

from data_models import load_path_model
from drllm.errors import UserError
from drllm.questions.likelihood import LikelihoodPrompt, likelihood_text
from drllm.questions.sets import Question, load_questions
from drllm.rollouts.engine import Request
from drllm.rollouts.likelihood import LikelihoodEngine, PackedRow
from drllm.rollouts.scores import ScoreStore, score_all
from drllm.search.pool import SearchPool
from drllm.search.tree import SearchSettings
from tests import search_toys
from tests.eval_toys import stock_lm
from train_models.paths import default_path, path_to_layer_indices

NUM_BLOCKS = 6


def make_prompt(number: int, rows: list[list[int]], scored: list[int], context: int, gold: int = 0) -> LikelihoodPrompt:
    labels = tuple("ABCDE"[: len(rows)])
    question = Question(
        "arc_easy", f"q{number}", "", tuple("x" * (n + 1) for n in range(len(rows))), labels, labels[gold]
    )
    lengths = tuple(range(1, len(rows) + 1))
    return LikelihoodPrompt(
        question, "", tuple(rows[0][:context]), tuple(map(tuple, rows)), tuple(scored), lengths, gold
    )


def random_prompts(count: int, seed: int = 0) -> list[LikelihoodPrompt]:
    """Contexts and options of different lengths; some options begin alike, some are one token long."""
    choose = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [choose.randrange(2, 61) for _ in range(choose.randint(1, most))]

    prompts = []
    for number in range(count):
        context, begin = tokens(12), tokens(2) if number % 3 == 0 else []
        options = [begin + (tokens(5) if number % 4 else tokens(1)) for _ in range(choose.randint(2, 5))]
        rows = [context + option for option in options]
        prompts.append(make_prompt(number, rows, [len(option) for option in options], len(context)))
    return prompts


def random_paths(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    choose = random.Random(seed)
    paths = [default_path(NUM_BLOCKS), (0, 1, 1, 0, 1, 2), (2, 1, 1, 1, 1, 0)]
    while len(paths) < count:
        paths.append(tuple(choose.choice((0, 1, 1, 1, 2)) for _ in range(NUM_BLOCKS)))
    return [path for path in paths if sum(path)]


@torch.no_grad()
def scores_alone(model, prompt: LikelihoodPrompt, path) -> list[float]:
    """Each option in a row of its own, through the model's plain forward pass."""
    scores = []
    for row, scored in zip(prompt.rows, prompt.scored, strict=True):
        logits = model(torch.tensor([row]), layer_indices=path_to_layer_indices(path)).logits[0].log_softmax(-1)
        scores.append(sum(float(logits[index - 1, row[index]]) for index in range(len(row) - scored, len(row))))
    return scores


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_packed_row_scores_as_each_option_alone(stock_checkpoint, family, attention):
    model = load_path_model(stock_checkpoint(family), dtype=torch.float32)
    model.set_attn_implementation(attention)
    engine = LikelihoodEngine(model, None, batch_size=4)
    cases = [(prompt, path) for prompt in random_prompts(8) for path in random_paths(5)]
    scores = engine.score([Request(prompt, path) for prompt, path in cases])
    for (prompt, path), found in zip(cases, scores, strict=True):
        assert found == pytest.approx(scores_alone(model, prompt, path), abs=1e-4)


def test_a_sliding_window_is_kept(stock_checkpoint):
    changes = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
    model = load_path_model(stock_checkpoint("qwen2", **changes), dtype=torch.float32)
    assert "sliding_attention" in model.config.layer_types
    engine = LikelihoodEngine(model, None, batch_size=8)
    prompts = random_prompts(6)
    scores = engine.score([Request(prompt, default_path(NUM_BLOCKS)) for prompt in prompts])
    for prompt, found in zip(prompts, scores, strict=True):
        assert found == pytest.approx(scores_alone(model, prompt, default_path(NUM_BLOCKS)), abs=1e-4)


@pytest.fixture(scope="module")
def toy(tmp_path_factory, stock_checkpoint):
    """(folder of a checkpoint, prompts of arc_easy's questions)."""
    folder = tmp_path_factory.mktemp("likelihood")
    from tests.conftest import STOCK

    search_toys.make_model(
        folder / "model",
        lambda family, changes: STOCK[family][1].from_pretrained(
            stock_checkpoint(family, **changes), dtype=torch.float32
        ),
    )
    data = search_toys.make_data(folder / "data", 12, seed=5)
    _, tokenizer = search_toys.load(folder / "model")
    prompts = [LikelihoodPrompt.of(question, tokenizer) for question in load_questions("arc_easy", "train", data)]
    return folder / "model", prompts


def test_scores_are_those_of_lm_eval(toy):
    folder, prompts = toy
    model, tokenizer = search_toys.load(folder)
    engine = LikelihoodEngine(model, tokenizer, batch_size=5)
    ours = engine.score([Request(prompt, default_path(NUM_BLOCKS)) for prompt in prompts])
    instances = [
        Instance("loglikelihood", {}, (likelihood_text(prompt.question)[0], continuation), 0)
        for prompt in prompts
        for continuation in likelihood_text(prompt.question)[1]
    ]
    theirs = iter(stock_lm(folder).loglikelihood(instances, disable_tqdm=True))
    for scores in ours:
        assert scores == pytest.approx([next(theirs)[0] for _ in scores], abs=1e-4)


def test_stored_states_change_nothing_and_are_bounded(toy):
    folder, prompts = toy
    model, tokenizer = search_toys.load(folder)
    requests = [Request(prompt, path) for path in random_paths(12, seed=2) for prompt in prompts]
    plain = LikelihoodEngine(model, tokenizer, 8, state_bytes=0)
    expected = [plain.score([request])[0] for request in requests]
    for state_bytes in (1 << 30, 20_000):
        engine = LikelihoodEngine(model, tokenizer, 8, state_bytes=state_bytes)
        scores = [
            score for start in range(0, len(requests), 12) for score in engine.score(requests[start : start + 12])
        ]
        for found, wanted in zip(scores, expected, strict=True):
            assert found == pytest.approx(wanted, abs=1e-4)
        assert engine._held_bytes <= state_bytes
        assert engine._held_bytes == sum(state.nbytes for state in engine._states.values())
        assert (engine.block_tokens < plain.block_tokens) == (state_bytes > 20_000)
        for prompt in prompts:
            engine.forget(prompt.question)
        assert not engine._states
        assert engine._held_bytes == 0


def test_a_path_starts_where_it_leaves_a_scored_one(toy):
    folder, prompts = toy
    model, tokenizer = search_toys.load(folder)
    engine = LikelihoodEngine(model, tokenizer, 8)
    prompt = prompts[0]
    length = len(PackedRow.of(prompt).tokens)
    costs = []
    for path in ((1, 1, 1, 1, 1, 1), (1, 0, 1, 1, 1, 1), (1, 0, 1, 1, 2, 1), (1, 1, 1, 1, 1, 2)):
        before = engine.block_tokens
        engine.score([Request(prompt, path)])
        costs.append((engine.block_tokens - before) / length)
    assert costs == [6, 5, 4, 4]  # the third path shares three blocks with the second, the fourth with the first


def test_the_reward_is_lm_evals_and_a_tie_is_wrong():
    prompt = make_prompt(0, [[5, 6], [5, 7, 8], [5, 9]], [1, 2, 1], 1, gold=1)
    assert prompt.is_right((-3.0, -2.0, -4.0), normalised=False)
    assert not prompt.is_right((-2.0, -2.0, -4.0), normalised=False)
    assert not prompt.is_right((-1.0, -2.0, -4.0), normalised=False)
    assert prompt.is_right((-1.5, -2.0, -6.0), normalised=True)  # -1.5, -1.0 and -2.0 per character
    assert prompt.margin((-3.0, -2.0, -2.5), normalised=False) == pytest.approx(0.5)


def test_a_search_with_this_reward_does_not_depend_on_the_batch(toy):
    folder, prompts = toy
    model, tokenizer = search_toys.load(folder)
    settings = SearchSettings(num_simulations=15)

    def search(batch_size: int, concurrency: int) -> dict:
        engine = LikelihoodEngine(model, tokenizer, batch_size)
        results = SearchPool(engine, settings, 0, concurrency).search(prompts)
        return {searched.prompt.question.id: searched.result for searched in results}

    expected = search(1, 1)
    assert len(expected) == len(prompts)
    assert any(result.best_path for result in expected.values())
    assert search(8, 16) == expected


def test_out_of_memory_halves_the_batch(toy, capsys, monkeypatch):
    folder, prompts = toy
    model, tokenizer = search_toys.load(folder)
    requests = [Request(prompt, default_path(NUM_BLOCKS)) for prompt in prompts]
    expected = LikelihoodEngine(model, tokenizer, 12).score(requests)
    engine = LikelihoodEngine(model, tokenizer, 12)
    run = engine._run

    def small_only(batch):
        if len(batch) > 3:
            raise torch.OutOfMemoryError
        return run(batch)

    monkeypatch.setattr(engine, "_run", small_only)
    for found, wanted in zip(engine.score(requests), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)
    assert "out of memory at 12 rows per batch: continuing with 6" in capsys.readouterr().err

    def never(batch):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine, "_run", never)
    with pytest.raises(UserError, match="one question runs out of memory"):
        engine.score(requests[:1])


def test_what_cannot_be_scored_is_refused(toy, stock_checkpoint):
    with pytest.raises(UserError, match=r"dart-1 is not multiple choice.*--reward generation"):
        likelihood_text(Question("dart-1", "q", "1+1", (), (), "2"))
    model = load_path_model(stock_checkpoint("llama"), dtype=torch.float32)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="attention 'flex_attention' cannot mask; use sdpa"):
        LikelihoodEngine(model, None, 1)


# Scores on disk


def work(prompts, paths):
    return [(prompt, paths) for prompt in prompts]


def test_nothing_is_scored_twice_and_a_kill_loses_the_batch_in_hand(toy, tmp_path, monkeypatch):
    folder, prompts = toy
    model, tokenizer = search_toys.load(folder)
    paths = random_paths(4)
    engine = LikelihoodEngine(model, tokenizer, 4)
    score_all(engine, work(prompts, paths), ScoreStore(tmp_path / "undisturbed", {"a": 1}), "scoring")
    expected = ScoreStore(tmp_path / "undisturbed", {"a": 1})
    assert len(expected) == len(prompts) * len(paths)

    engine = LikelihoodEngine(model, tokenizer, 4)
    run, calls = engine._run, []

    def stop(batch):
        calls.append(len(batch))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return run(batch)

    monkeypatch.setattr(engine, "_run", stop)
    with pytest.raises(KeyboardInterrupt):
        score_all(engine, work(prompts, paths), ScoreStore(tmp_path / "killed", {"a": 1}), "scoring")
    with (tmp_path / "killed" / "00000.jsonl").open("ab") as file:
        file.write(b'["q1", "11')  # cut off by the kill
    store = ScoreStore(tmp_path / "killed", {"a": 1})
    assert len(store) == sum(calls[:4])
    score_all(engine, work(prompts, paths), store, "scoring")
    assert sum(calls) - calls[4] == len(prompts) * len(paths)
    again = ScoreStore(tmp_path / "killed", {"a": 1})
    for prompt in prompts:
        for path in paths:
            assert again.get(prompt.question.id, path) == expected.get(prompt.question.id, path)


def test_processes_share_the_work(toy, tmp_path):
    folder, prompts = toy
    model, tokenizer = search_toys.load(folder)
    paths = random_paths(3)
    counts = []
    for rank in range(2):
        store = ScoreStore(tmp_path, {"a": 1}, rank)
        before = len(store)
        score_all(LikelihoodEngine(model, tokenizer, 2), work(prompts, paths), store, "scoring", rank, 2)
        counts.append(len(store) - before)
    assert counts == [len(prompts) * len(paths) / 2] * 2
    assert len(ScoreStore(tmp_path, {"a": 1})) == sum(counts)


def test_a_store_of_another_model_and_a_damaged_line_are_refused(tmp_path):
    ScoreStore(tmp_path, {"a": 1})
    with pytest.raises(UserError, match="holds scores of"):
        ScoreStore(tmp_path, {"a": 2})
    (tmp_path / "00000.jsonl").write_text(json.dumps(["q", "11", [1.0]]) + "\nnonsense\n")
    with pytest.raises(UserError, match=r"00000.jsonl:2: not a line of scores"):
        ScoreStore(tmp_path, {"a": 1})


def test_scores_that_are_not_finite_are_an_error(toy):
    model, prompts = load_path_model(str(toy[0]), dtype=torch.float32), random_prompts(2)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    request = Request(prompts[1], default_path(NUM_BLOCKS))
    with pytest.raises(UserError, match="question q1: the log-likelihoods along the path 111111 are NaN"):
        LikelihoodEngine(model, None, batch_size=2).score([request])
