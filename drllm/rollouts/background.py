"""Grading beside the model: while the next batch runs, threads hand the last one's answers to helper processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from drllm.processes import helper_count
from drllm.questions.prompts import Prompt
from drllm.questions.sets import SETS


@dataclass(frozen=True)
class Rollout:
    """A greedy response, without special tokens, its reward, and whether it holds an answer that can be graded."""

    response: str
    is_right: bool
    has_answer: bool = True

    @property
    def scores(self) -> tuple[float, float]:
        """What a store of scores keeps of it."""
        return float(self.is_right), float(self.has_answer)


class BackgroundGrader:
    """Grades responses to maths in threads, since a helper process may take long over one; all others at once.

    Attributes:
        graded, seconds: answers that were graded and what that took, summed over the threads.
        waited: seconds for which `results` had to wait, the device idle.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(helper_count(), thread_name_prefix="grading")
        self._running: dict[tuple[str, ...], Future[Rollout]] = {}  # one answer is graded once per gold answer
        self._counting = threading.Lock()
        self.graded = 0
        self.seconds = 0.0
        self.waited = 0.0

    def submit(self, prompt: Prompt, response: str) -> Future[Rollout]:
        """The rollout of `response`, soon."""
        question = prompt.question
        if SETS[question.set].kind != "math":
            done: Future[Rollout] = Future()
            done.set_result(self._grade(prompt, response))
            return done
        key = prompt.response_format.seed(question), question.answer, response
        if key not in self._running:
            self._running[key] = self._threads.submit(self._grade, prompt, response)
        return self._running[key]

    def results(self, rollouts: Sequence[Future[Rollout]]) -> list[Rollout]:
        """The rollouts, when all are graded."""
        start = time.perf_counter()
        done = [rollout.result() for rollout in rollouts]
        self.waited += time.perf_counter() - start
        self._running.clear()
        return done

    def _grade(self, prompt: Prompt, response: str) -> Rollout:
        start = time.perf_counter()
        form, question = prompt.response_format, prompt.question
        is_right = form.grade(question, response)
        rollout = Rollout(response, is_right, is_right or form.has_answer(question, response))
        with self._counting:
            self.seconds += time.perf_counter() - start
            self.graded += 1
        return rollout
