"""Static paths: one path for all questions, chosen on training questions."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

import torch

from drllm.questions.padding import pad_ids
from extensions.baselines.interface import Cost, Tensors
from extensions.baselines.outcomes import Outcome
from train_models.paths import EXECUTE, SKIP, Path, default_path

if TYPE_CHECKING:
    from extensions.baselines.bench import Bench

CALIBRATION_BATCH = 16


class StaticPath:
    """A `Baseline` that gives every question the same path; a subclass says which."""

    name: str

    def path(self, bench: Bench, skips: int) -> Path:
        """The path with `skips` blocks skipped."""
        raise NotImplementedError

    def fit(self, bench: Bench, skips: int, seed: int, progress: FilePath) -> tuple[Tensors, Cost]:
        """See `Baseline.fit`; neither `seed` nor `progress` is used."""
        return {"path": torch.tensor(self.path(bench, skips))}, Cost()

    def outcome(self, bench: Bench, fitted: Tensors) -> Outcome:
        """See `Baseline.outcome`."""
        return bench.along([path_of(fitted)] * len(bench.prompts))


def path_of(fitted: Tensors) -> Path:
    """The path of a fitted `StaticPath`."""
    return tuple(fitted["path"].tolist())


@dataclass(frozen=True)
class EarlyExit(StaticPath):
    """LayerSkip's inference (Elhoushi et al. 2024, arXiv 2404.16710) on a frozen base: the last blocks are skipped.

    LayerSkip itself trains the base with layer dropout and an early-exit loss, which is what makes it work.
    """

    name = "LayerSkip early exit"

    def path(self, bench: Bench, skips: int) -> Path:
        """See `StaticPath.path`; no question is looked at."""
        return (EXECUTE,) * (bench.num_blocks - skips) + (SKIP,) * skips


@dataclass(frozen=True)
class BlockInfluence(StaticPath):
    """ShortGPT (Men et al. 2024, arXiv 2403.03853): skips the blocks whose output is most similar to their input.

    calibration_questions: about so many of the training questions, evenly spaced, are used.
    """

    calibration_questions: int = 128

    name = "ShortGPT"

    def path(self, bench: Bench, skips: int) -> Path:
        """See `StaticPath.path`."""
        order = self.similarities(bench).argsort(descending=True).tolist()
        return tuple(SKIP if block in order[:skips] else EXECUTE for block in range(bench.num_blocks))

    @torch.inference_mode()
    def similarities(self, bench: Bench) -> torch.Tensor:
        """Cosine similarity of each block's input and output (1 - block influence), summed over prompt tokens, [L]."""
        stride = max(1, len(bench.training) // self.calibration_questions)
        prompts = [question.prompt.input_ids for question in bench.training[::stride]]
        sums = torch.zeros(bench.num_blocks)
        batch: dict[str, torch.Tensor] = {}

        def compare(layer, arguments, output) -> None:
            real = batch["attention_mask"].bool()
            cosine = torch.cosine_similarity(arguments[0][real], output[real], dim=-1)
            sums[layer.self_attn.layer_idx] += cosine.sum().item()

        hooks = [layer.register_forward_hook(compare) for layer in bench.routed.model.layers]
        try:
            for start in range(0, len(prompts), CALIBRATION_BATCH):
                batch.update(pad_ids(prompts[start : start + CALIBRATION_BATCH], 0, bench.routed.device))
                bench.routed.model(**batch, layer_indices=list(range(bench.num_blocks)), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return sums


@dataclass(frozen=True)
class GreedySkips(StaticPath):
    """Skips blocks one after the other, each the one without which the training questions have the highest reward."""

    name = "static"

    def path(self, bench: Bench, skips: int) -> Path:
        """See `StaticPath.path`."""
        path = default_path(bench.num_blocks)
        for number in range(skips):
            options = [
                (*path[:block], SKIP, *path[block + 1 :]) for block in range(bench.num_blocks) if path[block] != SKIP
            ]
            rewards = bench.training_rewards(options, f"static path, skip {number + 1}")
            path = max(options, key=lambda option: statistics.mean(rewards[option]))
        return path
