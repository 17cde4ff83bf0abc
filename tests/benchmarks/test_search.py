"""The sides of the search benchmark do the same work: same results, same rewards, in processes and alone."""

import functools
import json

import pytest
import torch

from benchmarks import search
from benchmarks.search_sides import (
    generate_one,
    load,
    load_prompts,
    make_engine,
    same_results,
    score_options,
    search_batched,
    search_published,
)
from drllm.rollouts.batches import BatchLimit
from drllm.rollouts.engine import Request
from drllm.search.tree import SearchSettings


@pytest.mark.parametrize(("reward", "dataset"), [("generation", "arc,dart-3"), ("likelihood", "arc")])
def test_both_sides_find_the_same(reward, dataset, monkeypatch):
    monkeypatch.setattr("benchmarks.pairs.usable_cores", lambda: 2)
    args = search.parse_arguments(["speed", "--reward", reward, "--dataset", dataset, "--batch_size", "8"])
    model, tokenizer, _ = load(args)
    prompts = load_prompts(args, tokenizer, 6)
    settings = SearchSettings(num_simulations=4)
    batched, simulations = search_batched(make_engine(args, model, tokenizer, BatchLimit(8)), prompts, settings, 0, 8)
    respond = functools.partial(generate_one if reward == "generation" else score_options, model, tokenizer)
    published, published_simulations = search_published(respond, 10, prompts, settings, 0)
    assert published_simulations == simulations > 0
    assert same_results(batched, published) == len(prompts)

    # A side that followed other paths would not go unnoticed.
    wrong_path = functools.partial(search_published, lambda prompt, path: respond(prompt, (1,) * 9 + (0,)))
    assert same_results(batched, wrong_path(10, prompts, settings, 0)[0]) < len(prompts)


def test_options_scored_alone_agree_with_packed_rows():
    args = search.parse_arguments(["speed", "--reward", "likelihood", "--dataset", "arc"])
    model, tokenizer, _ = load(args)
    prompts = load_prompts(args, tokenizer, 8)
    path = (1, 1, 1, 0, 1, 2, 1, 1, 1, 1)
    packed = make_engine(args, model, tokenizer, BatchLimit(8)).respond([Request(prompt, path) for prompt in prompts])
    alone = [score_options(model, tokenizer, prompt, path) for prompt in prompts]
    assert [(rollout.response, rollout.is_right) for rollout in packed] == alone
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_the_command_writes_pairs_of_both_threads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.pairs.usable_cores", lambda: 2)
    arguments = ["speed", "--questions", "4", "--num_simulations", "3", "--pairs", "2", "--threads", "1,2"]
    assert not search.main([*arguments, "--output_dir", str(tmp_path)])
    figures = json.loads((tmp_path / "search_speed.json").read_text())["figures"]
    for threads in ("threads_1", "threads_2"):
        assert figures[threads]["questions_with_same_result"] == figures[threads]["questions_compared"] == 4
        for ratio in ("engine_over_published", "engine_over_plain"):
            assert len(figures[threads][ratio]["ratios"]) == 2
    assert "UNUSABLE: only 2 pairs" in capsys.readouterr().out
