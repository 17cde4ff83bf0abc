"""The benchmark of latency measures what it says: counts and paths here, never times."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks import latency, latency_runs
from train_models.paths import SKIP


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """(arguments) -> (the written result, what was printed) of a run at a tiny shape."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **sizes).save_pretrained(tmp_path)

    def call(*arguments: str) -> tuple[dict, str]:
        output = tmp_path / "result.json"
        command = ["latency.py", "--config", str(tmp_path), "--device", "cpu", "--output", str(output)]
        command += ["--new_tokens", "4", "--prompt_tokens", "9", "--rounds", "2"]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        assert not latency.main()
        return json.loads(output.read_text()), capsys.readouterr().out

    return call


def test_a_run_reports_every_case(run, tmp_path):
    figure = tmp_path / "figure.png"
    result, printed = run("--skip", "0,2", "--repeat", "0,1", "--batch_sizes", "1,3", "--figure", str(figure))
    assert figure.stat().st_size > 1000
    assert "no GPU figures in it" in printed
    assert "decoding saved at 1 threads, batch 3, 2 skipped" in printed
    assert "UNUSABLE: path over stock at 1 threads, batch 1, 2 skipped, shared: only 2 pairs" in printed
    for field in ("command", "seed", "machine", "versions", "commit", "seconds"):
        assert field in result
    kinds = [(row["batch_size"], row["skips"], row["repeats"], row["rows"]) for row in result["rows"]]
    assert len(kinds) == len(set(kinds)) == 4 + 4 + 3 * 3
    for row in result["rows"]:
        saved = (row["skips"] - row["repeats"]) / 6
        assert row["layers_saved"] == pytest.approx(saved)
        assert row["cache_ratio"] == pytest.approx(1 - saved), "the cache holds what ran"
        assert len(row["timings"]["stock"]) == len(row["timings"]["path"]) == 2
        assert ("router_share" in row) == (row["rows"] == "shared")
        assert (row["static_token_ratio"] is not None) == (row["skips"] == row["repeats"] == 0)
        if row["rows"] == "shared":
            assert row["bound_on_decode_saved"] == pytest.approx(row["skips"] / 6 * row["blocks_share_of_token"])
            assert 0 < row["router_share"] < 1


def test_the_routers_decide_the_path_that_is_timed(run, monkeypatch):
    decided = []
    generate = latency_runs.generate

    def watched(model, input_ids, new_tokens, cache, **arguments):
        timing = yield from generate(model, input_ids, new_tokens, cache, **arguments)
        if isinstance(cache, latency_runs.PathCache):
            decided.append((bool(arguments), cache.paths))
        return timing

    monkeypatch.setattr(latency_runs, "generate", watched)
    run("--skip", "2", "--repeat", "1", "--batch_sizes", "2", "--rows", "shared", "--measure", "path,router")
    given = {tuple(paths) for was_given, paths in decided if was_given}
    routed = {tuple(paths) for was_given, paths in decided if not was_given}
    assert given == routed
    assert len(given) == 1
    assert next(iter(given))[0].count(SKIP) == 2


def test_static_routing_is_paired_with_the_stock_model(run):
    row = run("--skip", "0", "--batch_sizes", "2", "--measure", "static,stock_again")[0]["rows"][0]
    for name in ("static", "stock_again"):
        for part in ("first", "token", "total"):
            assert row[f"{name}_{part}_ratio"] > 0
            assert row[f"{name}_{part}_paired"] > 0


@pytest.mark.slow
def test_compiled_decoding_is_timed(run):
    measured = "path,compiled,compiled_whole,stock_compiled"
    row = run("--skip", "2", "--batch_sizes", "1", "--measure", measured)[0]["rows"][0]
    assert row["compiled_token_ratio"] > 0
    assert row["compiled_whole_token_ratio"] > 0
    assert row["stock_compiled_token_ratio"] > 0


@pytest.mark.parametrize("source", ["--config", "--model"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_models_have_the_attention_asked_for(source, attention, run, tmp_path, monkeypatch):
    if source == "--model":
        AutoModelForCausalLM.from_config(Qwen2Config.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    arguments = [source, str(tmp_path), "--device", "cpu", "--attention", attention]
    monkeypatch.setattr(sys, "argv", ["latency.py", *arguments])
    stock, routed = latency_runs.load_models(latency.parse_arguments())
    for model in (stock, routed):
        assert model.config._attn_implementation == model.model.config._attn_implementation == attention
    routed.model.is_static_routing = True
    input_ids = torch.randint(61, (2, 9))
    for mask in (None, (torch.arange(9) >= 3).long().expand(2, 9)):
        assert torch.equal(stock(input_ids, mask).logits, routed(input_ids, mask).logits)


def test_both_sides_have_the_threads_of_the_row(run, monkeypatch):
    threads = []
    generate = latency_runs.generate

    def watched(*arguments, **named):
        threads.append(torch.get_num_threads())
        return (yield from generate(*arguments, **named))

    monkeypatch.setattr(latency_runs, "generate", watched)
    monkeypatch.setattr("benchmarks.pairs.usable_cores", lambda: 2)
    result, _ = run("--skip", "1", "--batch_sizes", "1", "--measure", "path", "--threads", "1,2")
    assert [row["threads"] for row in result["rows"]] == [1, 2]
    assert threads == [1] * 6 + [2] * 6


def test_seconds_stand_beside_the_papers(run):
    _, printed = run("--skip", "2", "--batch_sizes", "1", "--measure", "router")
    assert "paper, 1,000 tokens: stock 34.49 s, routed 29.21 s (x 0.847), of which routers 0.270 s" in printed
    assert "here, 1 threads, 2 skipped, 4 tokens: stock 0." in printed


def test_the_blocks_asked_for(run):
    result, _ = run("--blocks", "4", "--skip", "1", "--batch_sizes", "1", "--measure", "path")
    assert result["num_blocks"] == 4
    assert result["rows"][0]["layers_saved"] == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--skip", "5"], "need more than the 4 inner blocks"),
        (["--measure", "speed"], "--measure speed: choose from path"),
        (["--rows", "all"], "--rows all: choose from shared"),
    ],
)
def test_wrong_arguments_end_with_a_sentence(arguments, sentence, tmp_path, run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latency.py", "--config", str(tmp_path), "--device", "cpu", *arguments])
    assert latency.main() == 2
    assert sentence in capsys.readouterr().err
