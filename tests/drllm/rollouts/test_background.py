"""Grading beside the model: nothing twice, the order kept, and batches do not wait for the grades of others."""

import threading

import pytest

from drllm.processes import helper_count
from drllm.questions.prompts import Prompt
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import Question
from drllm.rollouts.background import BackgroundGrader
from drllm.rollouts.engine import Request, RolloutEngine
from tests import search_toys


def prompt(number: int, gold: str, name: str = "dart-1") -> Prompt:
    labels = ("A", "B") if name == "arc_easy" else ()
    return Prompt(Question(name, f"q{number}", "", labels, labels, gold), "", (3, 4), 5)


def test_an_answer_is_graded_once_per_gold_answer(monkeypatch):
    calls, gate = [], threading.Event()

    def grade(self, question, response):
        calls.append((question.answer, response))
        assert gate.wait(10)
        return response == question.answer

    monkeypatch.setattr(ResponseFormat, "grade", grade)
    grader = BackgroundGrader()
    asked = [("1", "1"), ("1", "2"), ("1", "1"), ("2", "2"), ("1", "2")]
    waiting = [grader.submit(prompt(number, gold), given) for number, (gold, given) in enumerate(asked)]
    gate.set()
    assert [rollout.is_right for rollout in grader.results(waiting)] == [True, False, True, True, False]
    assert sorted(calls) == [("1", "1"), ("1", "2"), ("2", "2")]
    assert grader.graded == 3
    letter = grader.submit(prompt(9, "A", "arc_easy"), "A")
    assert letter.done(), "cheap answers need no thread"


def test_an_error_of_the_grader_is_not_lost(monkeypatch):
    monkeypatch.setattr(ResponseFormat, "grade", lambda *_: 1 / 0)
    grader = BackgroundGrader()
    with pytest.raises(ZeroDivisionError):
        grader.results([grader.submit(prompt(0, "1"), "1")])


def test_the_next_batch_runs_while_answers_are_graded(tmp_path, stock_model, monkeypatch):
    model, tokenizer = search_toys.load(search_toys.make_model(tmp_path / "model", stock_model))
    prompts = search_toys.prompts(search_toys.make_data(tmp_path / "data", 4), tokenizer, ("dart-1",))
    requests = [Request(one, (1,) * 6) for one in prompts]
    expected = RolloutEngine(model, tokenizer, 2).respond(requests)
    engine, last_batch, grade = RolloutEngine(model, tokenizer, 2), threading.Event(), ResponseFormat.grade
    run, batches = engine._run, []

    def noting(batch):
        run(batch)
        batches.append(len(batch))
        if sum(batches) == len(requests):
            last_batch.set()

    def late(self, question, response):
        assert last_batch.wait(10), "a batch waited for the grades of another one"
        return grade(self, question, response)

    monkeypatch.setattr(engine, "_run", noting)
    monkeypatch.setattr(ResponseFormat, "grade", late)
    assert engine.respond(requests) == expected
    assert len(batches) > 1
    assert engine.grader.graded == len(
        {(one.prompt.question.answer, got.response) for one, got in zip(requests, expected, strict=True)}
    )


def test_helpers_are_the_cores_of_a_process_but_one(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert helper_count() == 15
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert helper_count() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert helper_count() == 1
