"""One interface for methods that save blocks on a frozen base model.

A `Baseline` is fitted on training questions with the budget "save so many blocks on average", and answers the test
questions of a `Bench`, which counts the block applications:

    fitted, cost = fit_once(MindSkip(), bench, skips=4, seed=0)
    outcome = MindSkip().outcome(bench, fitted)       # right or wrong and block applications, per question

No baseline here changes base weights; those that would are in docs/rivals.md.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from drllm.files import is_whole, write_tensors
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.questions.sets import SETS
from drllm.rollouts.rewards import AnyPrompt
from extensions.baselines.outcomes import Outcome

if TYPE_CHECKING:
    from extensions.baselines.bench import Bench


@dataclass(frozen=True)
class Answered:
    """A prompt and the tokens of its gold answer, in the form that the prompt asks for."""

    prompt: AnyPrompt
    answer_ids: tuple[int, ...]

    @classmethod
    def of(cls, prompt: AnyPrompt, tokenizer) -> Answered:
        """`prompt` with its gold answer: the right option; a boxed value for math; otherwise the answer, then EOS."""
        if isinstance(prompt, LikelihoodPrompt):
            return cls(prompt, prompt.rows[prompt.gold][-prompt.scored[prompt.gold] :])
        question = prompt.question
        is_math = SETS[question.set].kind == "math"
        text = f" \\boxed{{{question.answer}}}" if is_math else f" {question.answer}"
        answer_ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return cls(prompt, tuple(answer_ids))


@dataclass(frozen=True)
class Cost:
    """What a method adds to the base model.

    Attributes:
        parameters: trainable parameters added to the base.
        seconds: wall-clock time of the fit, on the machine that the result names; None where it is not known.
    """

    parameters: int = 0
    seconds: float | None = 0.0


Tensors = Mapping[str, torch.Tensor]


class Baseline(Protocol):
    """A method that saves blocks on a frozen base; a dataclass, whose fields are its settings."""

    name: str

    def fit(self, bench: Bench, skips: int, seed: int, progress: FilePath) -> tuple[Tensors, Cost]:
        """Fits on the training questions of `bench`; returns what `outcome` needs, and the cost.

        Args:
            bench: holds a routed model, of which only the frozen base is used, and the training questions.
            skips: how many of the L blocks to save on average.
            seed: seed for initial weights and the order of questions.
            progress: file for the state of an unfinished training, from which it is resumed.
        """

    def outcome(self, bench: Bench, fitted: Tensors) -> Outcome:
        """Answers to the test questions of `bench`, and block applications."""


def fit_once(baseline: Baseline, bench: Bench, skips: int, seed: int) -> tuple[Tensors, Cost]:
    """`baseline.fit`, or what an earlier call with the same settings, base model and questions left on disk.

    Raises:
        UserError: the folder of `bench` cannot be written.
    """
    inputs = bench.key | {
        "baseline": repr(baseline),
        "skips": skips,
        "seed": seed,
        "questions": [answered.prompt.question.id for answered in bench.training],
    }
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]
    folder = bench.folder / "fitted"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{baseline.name.replace(' ', '-')}-{seed}-{digest}.safetensors"
    if not is_whole(path):
        progress = path.with_suffix(".progress")
        start = time.perf_counter()
        tensors, cost = baseline.fit(bench, skips, seed, progress)
        # A training that was resumed counts its earlier seconds itself.
        cost = replace(cost, seconds=max(cost.seconds or 0, time.perf_counter() - start))
        write_tensors(path, tensors, {"cost": json.dumps(vars(cost))})
        progress.unlink(missing_ok=True)
    with safe_open(path, framework="pt") as file:
        return load_file(path), Cost(**json.loads(file.metadata()["cost"]))
