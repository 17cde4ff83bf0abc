"""Static paths: one path for all questions, chosen on training questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from drllm.group_paths.margin_rewards import Answered, MarginRewards, RoundStore
from drllm.questions.padding import pad_ids
from train_models.paths import EXECUTE, SKIP, Path, default_path


class StaticRival(Protocol):
    """A method that gives every question the same path."""

    name: str

    def fit(self, routed: PreTrainedModel, questions: Sequence[Answered], most_skips: int) -> list[Path]:
        """Chooses the paths of 0, 1, ..., `most_skips` skipped blocks on training questions.

        Args:
            routed: a routed model; only its frozen base is used.
            questions: training questions with their gold answers.
        """


@dataclass(frozen=True)
class EarlyExit:
    """Skips the last blocks, as LayerSkip does at inference; `fit` looks at no question."""

    name = "early exit"

    def fit(self, routed: PreTrainedModel, questions: Sequence[Answered], most_skips: int) -> list[Path]:
        """See `StaticRival.fit`."""
        num_blocks = routed.config.num_hidden_layers
        return [(EXECUTE,) * (num_blocks - skips) + (SKIP,) * skips for skips in range(most_skips + 1)]


@dataclass(frozen=True)
class BlockInfluence:
    """Skips the blocks whose output is most similar to their input (ShortGPT's block influence, 1 - cosine).

    calibration_questions: about so many of the questions, evenly spaced, are used.
    """

    batch_size: int = 64
    calibration_questions: int = 512

    name = "influence"

    def fit(self, routed: PreTrainedModel, questions: Sequence[Answered], most_skips: int) -> list[Path]:
        """See `StaticRival.fit`."""
        order = self.similarities(routed, questions).argsort(descending=True).tolist()
        blocks = range(routed.config.num_hidden_layers)
        return [
            tuple(SKIP if block in order[:skips] else EXECUTE for block in blocks) for skips in range(most_skips + 1)
        ]

    @torch.inference_mode()
    def similarities(self, routed: PreTrainedModel, questions: Sequence[Answered]) -> torch.Tensor:
        """Cosine similarity of each block's input and output, summed over prompt tokens, [L]."""
        stride = max(1, len(questions) // self.calibration_questions)
        prompts = [question.prompt.input_ids for question in questions[::stride]]
        num_blocks = routed.config.num_hidden_layers
        sums = torch.zeros(num_blocks)
        batch: dict[str, torch.Tensor] = {}

        def compare(layer, arguments, output) -> None:
            real = batch["attention_mask"].bool()
            cosine = torch.cosine_similarity(arguments[0][real], output[real], dim=-1)
            sums[layer.self_attn.layer_idx] += cosine.sum().item()

        hooks = [layer.register_forward_hook(compare) for layer in routed.model.layers]
        try:
            for start in range(0, len(prompts), self.batch_size):
                batch.update(pad_ids(prompts[start : start + self.batch_size], 0, routed.device))
                routed.model(**batch, layer_indices=list(range(num_blocks)), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return sums


@dataclass(frozen=True)
class GreedySkips:
    """Skips blocks one after the other, each the one whose loss leaves the highest mean margin reward.

    store: keeps what was measured, so that a stopped run measures nothing twice.
    """

    batch_size: int = 64
    store: RoundStore | None = None

    name = "static"

    def fit(self, routed: PreTrainedModel, questions: Sequence[Answered], most_skips: int) -> list[Path]:
        """See `StaticRival.fit`."""
        rewards = MarginRewards(routed, questions, self.batch_size, self.store)
        paths = [default_path(routed.config.num_hidden_layers)]
        while len(paths) <= most_skips:
            path = paths[-1]
            measured = rewards.around([path] * len(questions), with_windows=False, title=f"static, skip {len(paths)}")
            mean = measured.rewards[:, :, SKIP].mean(0)
            mean[[block for block, visits in enumerate(path) if visits == SKIP]] = -math.inf
            block = int(mean.argmax())
            paths.append((*path[:block], SKIP, *path[block + 1 :]))
        return paths
