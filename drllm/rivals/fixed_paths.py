"""Rivals that give every question the same path, under the interface `Rival`: ShortGPT and LayerSkip's early exit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from transformers import PreTrainedModel

from drllm.evaluation.outcomes import Outcome
from drllm.group_paths.margin_rewards import Answered
from drllm.rivals.interface import Bench, Cost
from drllm.rivals.static_paths import BlockInfluence, EarlyExit, StaticRival
from train_models.paths import Path


@dataclass(frozen=True)
class FixedPath:
    """A `StaticRival` as a `Rival`; nothing is trained.

    chooser: chooses the path.
    name: in tables.
    """

    chooser: StaticRival
    name: str

    def fit(
        self, routed: PreTrainedModel, questions: Sequence[Answered], skips: int, seed: int, progress: FilePath | None
    ) -> FittedPath:
        """See `Rival.fit`; neither `seed` nor `progress` is used."""
        start = time.perf_counter()
        path = self.chooser.fit(routed, questions, skips)[skips]
        return FittedPath(self.name, path, Cost(seconds=time.perf_counter() - start))

    def restore(self, routed: PreTrainedModel, tensors: Mapping[str, torch.Tensor], cost: Cost) -> FittedPath:
        """See `Rival.restore`."""
        return FittedPath(self.name, tuple(tensors["path"].tolist()), cost)


@dataclass
class FittedPath:
    """One path for all questions."""

    name: str
    path: Path
    cost: Cost

    def outcome(self, bench: Bench) -> Outcome:
        """See `FittedRival.outcome`."""
        return bench.along(self.name, [self.path] * len(bench.prompts))

    def tensors(self) -> dict[str, torch.Tensor]:
        """See `FittedRival.tensors`."""
        return {"path": torch.tensor(self.path)}


def short_gpt(calibration_questions: int = 128) -> FixedPath:
    """ShortGPT (Men et al. 2024, arXiv 2403.03853): the blocks of least influence on calibration text are skipped."""
    return FixedPath(BlockInfluence(batch_size=16, calibration_questions=calibration_questions), "ShortGPT")


def layer_skip() -> FixedPath:
    """LayerSkip's inference (Elhoushi et al. 2024, arXiv 2404.16710) on a frozen base: the last blocks are skipped.

    LayerSkip itself trains the base with layer dropout and an early-exit loss, which is what makes it work.
    """
    return FixedPath(EarlyExit(), "LayerSkip early exit")
