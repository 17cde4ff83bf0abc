"""Paths that come from routers: with the knob set to a budget, and drawn at their rates regardless of the question."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path as FilePath

import torch
from transformers import PreTrainedModel

from drllm.files import read_json
from drllm.rollouts.rewards import AnyPrompt
from extensions.baselines.bench import Bench
from extensions.baselines.interface import Cost
from train_models.paths import Path

LOWEST_CONTROL, BASE_CONTROL = -1.0, 0.5  # every block skipped; the base model (Appendix B)
CONTROL_STEPS = 8
LAYERS_ERROR = 0.02  # blocks
TRAINING_RECORD = "training.json"  # of train.py, in a checkpoint


def control_at(bench: Bench, routed: PreTrainedModel, layers: float, prompts: Sequence[AnyPrompt]) -> float:
    """The knob at which `prompts`, which must be training prompts, run about `layers` blocks on average.

    By bisection. Routers that are unsure in the same way flip together, so the budget may fall into a jump; then it is
    the knob that came closest.
    """
    low, high = LOWEST_CONTROL, BASE_CONTROL
    errors: dict[float, float] = {}
    for _ in range(CONTROL_STEPS):
        control = (low + high) / 2
        paths = bench.decisions(routed, prompts, control)
        executed = sum(map(sum, paths)) / len(paths)
        errors[control] = abs(executed - layers)
        if errors[control] < LAYERS_ERROR:
            break
        low, high = (low, control) if executed > layers else (control, high)
    return min(errors, key=errors.__getitem__)


def routing_cost(routed: PreTrainedModel, checkpoint: FilePath) -> Cost:
    """Parameters of the routers, and the seconds of their training without the search, where train.py recorded them."""
    record = checkpoint / TRAINING_RECORD
    seconds = read_json(record, "pass an undamaged checkpoint").get("seconds_training") if record.exists() else None
    return Cost(sum(tensor.numel() for tensor in routed.model.routers.state_dict().values()), seconds)


def random_paths(paths: Sequence[Path], seed: int) -> list[Path]:
    """`paths` with the actions of each block shuffled over the questions.

    Each block keeps its rates of skip, execute and repeat exactly, and so the mean length stays the same; what is lost
    is the connection to the question, and the one between blocks.
    """
    generator = random.Random(seed)
    columns = [generator.sample(column, len(column)) for column in zip(*paths, strict=True)]
    return list(zip(*columns, strict=True))


def random_skips(num_blocks: int, skips: int, count: int, seed: int) -> list[Path]:
    """`count` paths, each with `skips` blocks skipped that are drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    paths = []
    for _ in range(count):
        skipped = set(torch.randperm(num_blocks, generator=generator)[:skips].tolist())
        paths.append(tuple(int(block not in skipped) for block in range(num_blocks)))
    return paths
