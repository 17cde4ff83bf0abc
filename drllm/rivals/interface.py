"""One interface for methods that save blocks on a frozen base model.

A `Rival` is fitted on training questions with the budget "save so many blocks on average". The `FittedRival` answers
the test questions of a `Bench`, which counts the block applications:

    fitted = fit_once(MindSkip(), routed, bench.training, skips=4, seed=0, folder=work_dir / "fitted")
    outcome = fitted.outcome(bench)       # right or wrong and block applications, per question
    fitted.cost                           # trainable parameters, training seconds, whether base weights change

No rival here changes base weights; those that would are in docs/rivals.md.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from drllm.evaluation.outcomes import Outcome
from drllm.files import is_whole, write_tensors
from drllm.group_paths.margin_rewards import Answered
from drllm.provenance import fingerprint
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.questions.prompts import Prompt
from train_models.paths import Path

AnyPrompt = Prompt | LikelihoodPrompt


@dataclass(frozen=True)
class Cost:
    """What a method adds to the base model.

    Attributes:
        parameters: trainable parameters added to the base.
        seconds: wall-clock time of the fit, on the machine that the result names; None where it is not known.
        changes_base: whether base weights change.
    """

    parameters: int = 0
    seconds: float | None = 0.0
    changes_base: bool = False


class TokenLevelRival(Protocol):
    """A fitted rival with a forward pass of its own: it decides per token, so no path describes it."""

    name: str

    def score(self, prompts: Sequence[LikelihoodPrompt], batch_size: int) -> list[tuple[tuple[float, ...], float]]:
        """Per prompt (summed log-probabilities of the options in nats, block applications per token)."""

    def answer(self, prompts: Sequence[Prompt], tokenizer, batch_size: int) -> list[tuple[bool, float]]:
        """Per prompt (whether the greedy answer is right, block applications per token)."""


class Bench(Protocol):
    """Test questions and how they are judged; `drllm.rivals.benches` has one per kind of reward."""

    routed: PreTrainedModel
    prompts: Sequence[AnyPrompt]
    training: Sequence[Answered]
    batch_size: int

    def along(self, name: str, paths: Sequence[Path]) -> Outcome:
        """The outcome of one path per test question."""

    def with_own_forward(self, rival: TokenLevelRival) -> Outcome:
        """The outcome of a rival that decides per token."""


class FittedRival(Protocol):
    """A rival after `Rival.fit`."""

    name: str
    cost: Cost

    def outcome(self, bench: Bench) -> Outcome:
        """Answers to the test questions of `bench`, and block applications."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What `Rival.restore` needs."""


class Rival(Protocol):
    """A method that saves blocks on a frozen base; a dataclass, whose fields are its settings."""

    name: str

    def fit(
        self, routed: PreTrainedModel, questions: Sequence[Answered], skips: int, seed: int, progress: FilePath | None
    ) -> FittedRival:
        """Fits on training questions.

        Args:
            routed: a routed model; only its frozen base is used.
            questions: training questions with the tokens of their gold answers.
            skips: how many of the L blocks to save on average.
            seed: of initial weights and the order of questions.
            progress: file for the state of an unfinished training, from which it is resumed; None keeps nothing.
        """

    def restore(self, routed: PreTrainedModel, tensors: Mapping[str, torch.Tensor], cost: Cost) -> FittedRival:
        """The rival that `FittedRival.tensors` describes."""


def fit_once(
    rival: Rival, routed: PreTrainedModel, questions: Sequence[Answered], skips: int, seed: int, folder: FilePath
) -> FittedRival:
    """`rival.fit`, or what an earlier call with the same settings, base model and questions left in `folder`.

    Raises:
        UserError: `folder` cannot be written.
    """
    inputs = {
        "rival": repr(rival),
        "base": fingerprint(routed),
        "skips": skips,
        "seed": seed,
        "questions": [question.prompt.question.id for question in questions],
    }
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{rival.name.replace(' ', '-')}-{seed}-{digest}.safetensors"
    if is_whole(path):
        with safe_open(path, framework="pt") as file:
            cost = Cost(**json.loads(file.metadata()["cost"]))
        return rival.restore(routed, load_file(path), cost)
    progress = path.with_suffix(".progress")
    start = time.perf_counter()
    fitted = rival.fit(routed, questions, skips, seed, progress)
    # A training that was resumed counts its earlier seconds itself.
    seconds = max(fitted.cost.seconds, time.perf_counter() - start)
    fitted.cost = replace(fitted.cost, seconds=seconds)
    write_tensors(path, fitted.tensors(), {"cost": json.dumps(vars(fitted.cost))})
    progress.unlink(missing_ok=True)
    return fitted
