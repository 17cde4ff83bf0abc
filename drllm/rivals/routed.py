"""Routed checkpoints beside their rivals: decisions at the published knob, and with the knob set to a budget."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path as FilePath

import torch
from transformers import PreTrainedModel

from drllm.files import read_json, write_json
from drllm.rivals.interface import AnyPrompt, Cost
from drllm.rollouts.routed_paths import routed_paths
from train_models.paths import Path

LOWEST_CONTROL, BASE_CONTROL = -1.0, 0.5  # every block skipped; the base model (Appendix B)
CONTROL_STEPS = 8
LAYERS_ERROR = 0.02  # blocks
TRAINING_RECORD = "training.json"  # of train.py, in a checkpoint


class KeptDecisions:
    """The decisions of a routed checkpoint, kept in `folder` so that a stopped run makes none twice.

    own_control: the knob that the checkpoint came with.
    """

    def __init__(self, routed: PreTrainedModel, folder: FilePath, batch_size: int) -> None:
        self.routed = routed
        self.folder = folder
        self.batch_size = batch_size
        self.own_control: float = routed.model.routing_control
        digest = hashlib.sha256()
        for tensor in routed.model.routers.state_dict().values():
            digest.update(tensor.float().cpu().numpy().tobytes())
        self._routers = digest.hexdigest()

    def paths(self, prompts: Sequence[AnyPrompt], control: float) -> list[Path]:
        """One path per prompt, with the knob at `control`."""
        digest = hashlib.sha256(f"{self._routers} {control}".encode())
        for prompt in prompts:
            digest.update(repr(prompt.input_ids).encode())
        path = self.folder / f"{digest.hexdigest()[:20]}.json"
        if not path.exists():
            self.routed.model.routing_control = control
            decided = routed_paths(self.routed, prompts, self.batch_size)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"paths": ["".join(map(str, member)) for member in decided]})
        return [tuple(map(int, digits)) for digits in read_json(path, "delete it")["paths"]]

    def control_at(self, layers: float, prompts: Sequence[AnyPrompt]) -> float:
        """The knob at which `prompts`, which must be training prompts, run about `layers` blocks on average.

        By bisection. Routers that are unsure in the same way flip together, so the budget may fall into a jump; then it
        is the knob that came closest.
        """
        low, high = LOWEST_CONTROL, BASE_CONTROL
        errors: dict[float, float] = {}
        for _ in range(CONTROL_STEPS):
            control = (low + high) / 2
            paths = self.paths(prompts, control)
            executed = sum(map(sum, paths)) / len(paths)
            errors[control] = abs(executed - layers)
            if errors[control] < LAYERS_ERROR:
                break
            low, high = (low, control) if executed > layers else (control, high)
        return min(errors, key=errors.get)


def routing_cost(routed: PreTrainedModel, checkpoint: FilePath) -> Cost:
    """Parameters of the routers with their domains, and the seconds of their training without the search.

    The seconds are known where train.py recorded them.
    """
    record = checkpoint / TRAINING_RECORD
    seconds = read_json(record, "pass an undamaged checkpoint").get("seconds_training") if record.exists() else None
    return Cost(sum(tensor.numel() for tensor in routed.model.routers.state_dict().values()), seconds)


def random_skips(num_blocks: int, skips: int, count: int, seed: int) -> list[Path]:
    """`count` paths, each with `skips` blocks skipped that are drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    paths = []
    for _ in range(count):
        skipped = set(torch.randperm(num_blocks, generator=generator)[:skips].tolist())
        paths.append(tuple(int(block not in skipped) for block in range(num_blocks)))
    return paths
