"""Rows per batch: chosen from a stated memory, cut where padding costs, halved when memory runs out."""

import argparse
import random

import pytest
import torch
from accelerate import PartialState

from benchmarks.shapes import SHAPES
from drllm.rollouts import batches
from drllm.rollouts.batches import BatchLimit, limit_in, limit_on, run_in_batches
from drllm.search.inputs import SearchInputs, rows_or_auto

GB = 10**9
SIZES = [(110, 1)] * 90 + [(200, 1)] * 9 + [(1300, 1)]


def bytes_in_use(name: str, rows: int, tokens: int) -> int:
    """What `rows` prompts of `tokens` tokens take in bfloat16, added up tensor by tensor."""
    config = SHAPES[name]
    heads, head_dim = config.num_key_value_heads, getattr(config, "head_dim", None) or 128
    slot = 2 * heads * head_dim * tokens
    inputs = config.num_hidden_layers // 4 * config.hidden_size * tokens
    states = config.num_hidden_layers * slot + inputs
    cache = config.num_hidden_layers * slot * 1.25 * (1 + 1.3) + inputs
    visits = 2 * config.num_hidden_layers
    views = visits * 2 * head_dim * tokens
    mask = visits * tokens * tokens
    feed_forward = 3 * config.intermediate_size * tokens + 8 * config.hidden_size * tokens
    return round(rows * (2 * (2 * states + cache + views + feed_forward + config.vocab_size * 3) + mask))


@pytest.mark.parametrize("name", ["llama-3.2-3b", "llama-3.1-8b", "qwen2.5-7b"])
@pytest.mark.parametrize("free", [20 * GB, 130 * GB])
def test_rows_fill_the_share_of_a_stated_memory(name, free):
    limit = limit_in(free, SHAPES[name], 2, [(120, 1)] * 10)
    assert bytes_in_use(name, limit.rows, 120) <= 0.8 * free < bytes_in_use(name, limit.rows + 1, 120)
    assert limit.tokens == max(limit.rows * 120, 120)
    assert limit_in(free, SHAPES[name], 4, [(120, 1)] * 10).rows == pytest.approx(limit.rows / 2, rel=0.05)


def test_an_h200_takes_a_thousand_rows_at_3b_and_a_full_one_a_single_one():
    assert 700 < limit_in(130 * GB, SHAPES["llama-3.2-3b"], 2, [(110, 1)]).rows < 1200
    full = limit_in(0, SHAPES["llama-3.2-3b"], 2, SIZES)
    assert (full.rows, full.tokens) == (1, 1300), "the longest prompt is tried"
    assert limit_in(130 * GB, SHAPES["small"], 2, SIZES).rows == batches.MOST_ROWS
    many_logits = limit_in(130 * GB, SHAPES["llama-3.2-3b"], 2, [(110, 60)])
    assert many_logits.rows < 0.9 * limit_in(130 * GB, SHAPES["llama-3.2-3b"], 2, [(110, 1)]).rows


def test_a_cpu_has_128_rows_of_a_toy_and_32_of_an_llm(stock_model, monkeypatch):
    limit = limit_on(stock_model("llama"), SIZES)
    assert (limit.rows, limit.tokens) == (128, None)
    assert limit_on(stock_model("llama"), SIZES, 7).rows == 7
    model = stock_model("llama")
    monkeypatch.setattr(model, "num_parameters", lambda: 135_000_000)
    assert limit_on(model, SIZES).rows == 32


def test_a_cpu_does_not_pad_short_prompts_to_the_longest(stock_model, monkeypatch):
    """A batch of ARC's and MATH's prompts at once would be 4 parts padding."""
    model, done = stock_model("llama"), []
    assert limit_on(model, SIZES).padding > 10_000, "a tiny model's batches cost more than their padding"
    monkeypatch.setattr(model, "num_parameters", lambda: 5 * 10**8)
    limit = limit_on(model, SIZES, 128)
    choose = random.Random(0)
    widths = [choose.randint(60, 130) for _ in range(90)] + [choose.randint(150, 900) for _ in range(30)]
    run_in_batches(widths, lambda width: width, limit, done.append, lambda batch: False)
    assert sorted(width for batch in done for width in batch) == sorted(widths)
    padded = sum(len(batch) * max(batch) for batch in done)
    assert padded < 1.1 * sum(widths) < 0.3 * 120 * max(widths)
    assert max(len(batch) for batch in done) > 30, "short prompts make large batches"
    assert len(done) < 12


def test_no_batch_exceeds_rows_or_tokens_and_few_long_prompts_come_alone():
    choose = random.Random(0)
    widths = [choose.randint(30, 150) for _ in range(3000)] + [choose.randint(900, 1300) for _ in range(9)]
    limit, done = BatchLimit(rows=1000, tokens=100_000, padding=25_000), []
    run_in_batches(widths, lambda width: width, limit, done.append, lambda batch: False)
    assert sorted(width for batch in done for width in batch) == sorted(widths)
    assert all(len(batch) <= 1000 and len(batch) * max(batch) <= 100_000 for batch in done)
    assert len(done[0]) == 9, "cut off from the short ones"
    padded = sum(len(batch) * max(batch) for batch in done)
    assert padded < 1.4 * sum(widths)
    assert len(done) < 1.3 * padded / limit.tokens + 1, "batches are full"


def test_out_of_memory_halves_rows_and_tokens_until_it_fits(capsys):
    limit, done = BatchLimit(rows=8, tokens=80), []

    def run(batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        done.append(batch)

    run_in_batches([10] * 11, lambda width: width, limit, run, lambda batch: False)
    assert sum(map(len, done)) == 11
    assert (limit.rows, limit.tokens) == (2, 20)
    assert "out of memory at 6 rows per batch: continuing with 4" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        run_in_batches([1], lambda width: width, limit, lambda batch: 1 / 0, lambda batch: False)


def inputs_with(limit: BatchLimit, processes: int) -> SearchInputs:
    state = PartialState.__new__(PartialState)
    state.__dict__ = {"num_processes": processes}
    return SearchInputs(argparse.Namespace(), state, *[None] * 6, limit)


def test_questions_at_once_fill_two_batches_and_are_no_more_than_the_labels_of_a_process():
    assert inputs_with(BatchLimit(128), 1).questions_at_once(10) == 256, "as on a CPU before"
    on_a_card = BatchLimit(1000, 100_000)
    assert inputs_with(on_a_card, 1).questions_at_once(4000) == 2000
    assert inputs_with(on_a_card, 8).questions_at_once(4000) == 500
    assert rows_or_auto("auto") is None
    assert rows_or_auto("7") == 7
    with pytest.raises(argparse.ArgumentTypeError, match="'many' is neither a number nor auto"):
        rows_or_auto("many")
