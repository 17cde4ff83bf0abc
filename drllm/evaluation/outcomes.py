"""Accuracy and layers of a method on test questions, and paired statistics over questions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path as FilePath

import torch
from tqdm import tqdm

from drllm.questions.prompts import Prompt
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import load_questions
from drllm.rollouts.engine import Request, RolloutEngine
from drllm.rollouts.scores import ScoreStore
from train_models.paths import Path, default_path

ANSWERS_AT_ONCE = 4  # batches between two writes of a store: what a kill may lose


@dataclass(frozen=True)
class Outcome:
    """What a method did on N test questions, in their order.

    right: [N], 1 for a right answer, 0 for a wrong one; between 0 and 1 after averaging.
    layers: [N], block applications of one forward pass.
    """

    right: list[float]
    layers: list[float]

    @property
    def accuracy(self) -> float:
        """Mean of `right`."""
        return statistics.mean(self.right)

    @property
    def mean_layers(self) -> float:
        """Mean of `layers`."""
        return statistics.mean(self.layers)

    @classmethod
    def average(cls, outcomes: Sequence[Outcome], weights: Sequence[float] | None = None) -> Outcome:
        """The weighted mean per question, over seeds or over the parts of a mixture."""
        weights = weights or [1 / len(outcomes)] * len(outcomes)

        def mixed(field: str) -> list[float]:
            columns = [getattr(outcome, field) for outcome in outcomes]
            return [sum(w * v for w, v in zip(weights, values, strict=True)) for values in zip(*columns, strict=True)]

        return cls(mixed("right"), mixed("layers"))


def answer_along(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    paths: Sequence[Path],
    store: ScoreStore | None = None,
    title: str | None = "answering",
) -> Outcome:
    """Greedy answers of the engine's model along `paths`, one path per prompt, graded.

    Args:
        store: keeps whether an answer is right, by question and path; a resumed run answers nothing twice.
        title: of the progress bar; None: no bar.
    """
    right: dict[tuple[str, Path], float] = {}
    waiting = []
    for prompt, path in zip(prompts, paths, strict=True):
        stored = None if store is None else store.get(prompt.question.id, path)
        if stored is None:
            waiting.append(Request(prompt, path))
        else:
            right[prompt.question.id, path] = stored[0]
    waiting.sort(key=lambda request: len(request.prompt.input_ids))  # neighbours need little padding
    with tqdm(total=len(waiting), desc=title, unit="question", mininterval=1, disable=title is None) as progress:
        for start in range(0, len(waiting), ANSWERS_AT_ONCE * engine.batch_size):
            part = waiting[start : start + ANSWERS_AT_ONCE * engine.batch_size]
            answers = [float(rollout.is_right) for rollout in engine.respond(part)]
            for request, answer in zip(part, answers, strict=True):
                right[request.prompt.question.id, request.path] = answer
                engine.forget(request.prompt.question)
            if store is not None:
                store.add((r.prompt.question.id, r.path, (a,)) for r, a in zip(part, answers, strict=True))
            progress.update(len(part))
    pairs = zip(prompts, paths, strict=True)
    return Outcome([right[prompt.question.id, path] for prompt, path in pairs], [float(sum(path)) for path in paths])


@dataclass(frozen=True)
class EvaluationQuestions:
    """Test questions as prompts, and the outcome of the base model (the default path) on them."""

    prompts: list[Prompt]
    base: Outcome

    def per_set(self, outcome: Outcome) -> dict[str, dict[str, float]]:
        """Accuracy of the base model, and accuracy and layers of `outcome`, per question set."""
        indices: dict[str, list[int]] = {}
        for i, prompt in enumerate(self.prompts):
            indices.setdefault(prompt.question.set, []).append(i)
        return {
            name: {
                "base_accuracy": statistics.mean(self.base.right[i] for i in members),
                "accuracy": statistics.mean(outcome.right[i] for i in members),
                "layers": statistics.mean(outcome.layers[i] for i in members),
            }
            for name, members in indices.items()
        }


def load_test_questions(
    engine: RolloutEngine,
    sets: Sequence[str],
    data_dir: FilePath | None,
    chat: bool,
    limit: int | None,
    response_format: ResponseFormat | None = None,
    store: ScoreStore | None = None,
) -> EvaluationQuestions:
    """The test questions of `sets`, at most `limit` per set, answered along the default path.

    Args:
        data_dir: local question files; None: the Hub.
        chat: whether prompts get the chat template.
        response_format: of the responses; None: the default.
        store: see `answer_along`.
    """
    questions = [question for name in sets for question in load_questions(name, "test", data_dir, limit)]
    prompts = [Prompt.of(question, engine.tokenizer, chat, response_format) for question in questions]
    default = [default_path(engine.num_blocks)] * len(prompts)
    return EvaluationQuestions(prompts, answer_along(engine, prompts, default, store, "base"))


def mixture(controls: Sequence[Outcome], layers: float) -> Outcome | None:
    """The mixture of two neighbouring controls with `layers` layers on average; None outside their range."""
    ordered = sorted(controls, key=lambda outcome: outcome.mean_layers)
    for below, above in pairwise(ordered):
        if below.mean_layers <= layers <= above.mean_layers:
            width = above.mean_layers - below.mean_layers
            share = (layers - below.mean_layers) / width if width else 1.0
            return Outcome.average([below, above], [1 - share, share])
    return None


def paired_difference(outcome: Outcome, reference: Outcome) -> dict[str, float]:
    """Paired difference of accuracy in percentage points, with its 95% interval over questions (normal)."""
    differences = [100 * (a - b) for a, b in zip(outcome.right, reference.right, strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    return {"points": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error}


def share_recovered(outcome: Outcome, base: Outcome, known: Outcome, seed: int = 0) -> dict[str, float] | None:
    """The share of the gain of `known` over `base` that `outcome` has: (outcome - base) / (known - base) in accuracy.

    With its 95% interval: percentiles of 2,000 bootstrap samples of the questions, the same in all three terms; samples
    in which `known` gains nothing are left out. None where `known` is not above `base` at all.
    """
    right = torch.tensor([outcome.right, base.right, known.right], dtype=torch.float64)
    gained, known_gain = right[0] - right[1], right[2] - right[1]
    if known_gain.mean() <= 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    samples = [torch.randint(len(gained), (len(gained),), generator=generator) for _ in range(2000)]
    shares = [gained[sample].mean() / known_gain[sample].mean() for sample in samples if known_gain[sample].sum() > 0]
    low, high = torch.stack(shares).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"share": float(gained.mean() / known_gain.mean()), "low": low, "high": high}


def method_row(name: str, outcomes: Sequence[Outcome], base: Outcome, controls: Sequence[Outcome]) -> dict:
    """One method of the comparison: means and standard deviations over seeds, and the paired differences.

    Args:
        outcomes: one per seed, over the same questions.
        controls: static paths; the row has "against_static" where a mixture of two has as many layers.
    """
    average = Outcome.average(outcomes)
    several = len(outcomes) > 1
    row = {
        "method": name,
        "seeds": len(outcomes),
        "accuracy": average.accuracy,
        "accuracy_std": statistics.stdev([outcome.accuracy for outcome in outcomes]) if several else 0.0,
        "layers": average.mean_layers,
        "layers_std": statistics.stdev([outcome.mean_layers for outcome in outcomes]) if several else 0.0,
        "against_base": paired_difference(average, base),
    }
    static = mixture(controls, average.mean_layers)
    if static is not None:
        row["against_static"] = paired_difference(average, static)
    return row
