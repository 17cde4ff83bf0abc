"""kill -9 in the middle of each step on the LLM, then the same command: the same results, and no finished work is lost.

What a step has finished is counted on the disk. It may grow by no more than a batch at a time, so no more than a batch
is in hand at any moment.
"""

import json
import re

import pytest

from drllm.training.resuming import is_complete_checkpoint
from tests.llm.steps import BATCH, answers, kill_at, lines, numbers, run
from tests.llm.test_same_results import assert_equal_routers, comparison, training_record

pytestmark = pytest.mark.llm
OPTIONS = 4  # answers per question, at most


def test_search(steps, labels, scratch):
    progress = scratch / "progress"

    def searched() -> list[str]:  # a question may also be visited without a search
        return [row["question_id"] for row in map(json.loads, lines(progress)) if row["simulations"]]

    kept = kill_at(steps.search(scratch), lambda: len(lines(progress)), 3, batch=BATCH)
    assert not (scratch / "labels.jsonl").exists()
    before = lines(progress)
    assert len(before) == kept >= 3
    run(steps.search(scratch))
    assert lines(progress)[:kept] == before
    assert len(searched()) == len(set(searched())), "a finished search was repeated"
    assert (scratch / "labels.jsonl").read_bytes() == (labels / "labels.jsonl").read_bytes()


def test_training_in_an_epoch_and_while_the_checkpoint_is_written(steps, labels, trained, scratch):
    checkpoint = scratch / "killed"
    command = steps.training(labels, checkpoint)

    def epochs() -> int:  # one optimizer step each
        folders = (checkpoint / "trainer").glob("checkpoint-*")
        return max((int(f.name.split("-")[1]) for f in folders if is_complete_checkpoint(f)), default=0)

    kept = kill_at(command, epochs, 5, batch=1)
    assert 5 <= kept < training_record(trained)["steps"]
    # The configuration is written before the weights.
    kill_at(command, lambda: int((checkpoint / "config.json").exists()), 1, batch=1)
    assert not (checkpoint / "training.json").exists()
    printed = run(command)
    resumed = int(re.search(r"resuming \S+ from step (\d+)", printed).group(1))
    assert resumed >= kept
    assert "nothing to compute" in printed, "the features were kept"
    assert training_record(checkpoint)["history"] == training_record(trained)["history"]
    assert_equal_routers(checkpoint, trained)


def test_group_search(steps, grouped, scratch):
    measured = scratch / "killed-measured"
    total = len(lines(grouped.parent / "grouped-measured"))
    kept = kill_at(steps.group_search(scratch / "killed"), lambda: len(lines(measured)), total // 2, batch=BATCH)
    assert total // 2 <= kept < total
    before = lines(measured)
    run(steps.group_search(scratch / "killed"))
    assert lines(measured)[:kept] == before
    assert len(lines(measured)) == total
    assert (scratch / "killed" / "labels.jsonl").read_bytes() == (grouped / "labels.jsonl").read_bytes()


def test_evaluation(steps, trained, evaluated, scratch):
    cache = scratch / "router" / "answers.db"
    kill_at(steps.evaluation(trained, scratch), lambda: len(answers(cache)), 1, batch=OPTIONS * BATCH)
    base = (scratch / "base" / "run.json").stat().st_mtime_ns
    printed = run(steps.evaluation(trained, scratch))
    assert "base: complete, kept" in printed
    assert (scratch / "base" / "run.json").stat().st_mtime_ns == base
    for name in ("base", "router"):
        assert numbers(scratch / name) == numbers(evaluated / name)


def test_lm_eval_with_a_cache(steps, trained, scratch):
    def result(folder):
        (path,) = folder.rglob("results_*.json")
        (samples,) = folder.rglob("samples_*.jsonl")
        found = json.loads(path.read_text())
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        counts = found["config"]["block_applications"]
        return found["results"], counts, sorted((row["doc_id"], str(row["resps"]), row["acc"]) for row in rows)

    run(steps.lm_eval(trained, scratch / "whole.db", scratch / "whole"))
    expected = answers(scratch / "whole.db")
    command = steps.lm_eval(trained, scratch / "killed.db", scratch / "killed")
    kept = kill_at(command, lambda: len(answers(scratch / "killed.db")), 1, batch=OPTIONS * BATCH)
    assert 1 <= kept < len(expected)
    before = answers(scratch / "killed.db")
    run(command)
    after = answers(scratch / "killed.db")
    assert len(after) == len(expected)
    assert before.items() <= after.items(), "an answer was asked for twice"
    assert result(scratch / "killed") == result(scratch / "whole")


def test_comparison(steps, trained, compared, scratch):
    scores = scratch / "work" / "test"
    total = len(lines(compared / "work" / "test"))
    kept = kill_at(steps.comparison(trained, scratch), lambda: len(lines(scores)), total // 2, batch=BATCH)
    assert total // 2 <= kept < total
    before = lines(scores)
    run(steps.comparison(trained, scratch))
    assert lines(scores)[:kept] == before
    assert len(lines(scores)) == total
    assert comparison(scratch) == comparison(compared)
