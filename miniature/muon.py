"""The optimiser of the miniature's pre-training and its learning rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch

MUON_SCALE = 0.2


class Muon:
    """Muon (momentum orthogonalised by Newton-Schulz, Jordan et al. 2024) for the matrices of the blocks.

    Matrices of equal shape are orthogonalised as one batch, several times faster on a CPU than one by one. The update
    has a root mean square of MUON_SCALE times the learning rate, so that it shares the learning rate of AdamW. `dtype`
    is that of the orthogonalisation; CPUs without bfloat16 arithmetic are several times faster in float32.
    """

    def __init__(
        self,
        parameters: list[Any],
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.momentum, self.weight_decay, self.dtype = momentum, weight_decay, dtype
        shapes = sorted({tuple(p.shape) for p in parameters})
        self.groups = [[p for p in parameters if tuple(p.shape) == shape] for shape in shapes]
        self.buffers = [torch.zeros(len(group), *group[0].shape) for group in self.groups]

    def step(self, learning_rate: float) -> None:
        """Updates the parameters in place from their gradients."""
        with torch.no_grad():
            for group, buffer in zip(self.groups, self.buffers, strict=True):
                gradient = torch.stack([p.grad for p in group])
                buffer.lerp_(gradient, 1 - self.momentum)
                update = gradient.lerp(buffer, self.momentum).to(self.dtype)  # Nesterov
                tall = update.shape[1] > update.shape[2]
                update = update.mT if tall else update
                update = update / update.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):
                    gram = update @ update.mT
                    update = 3.4445 * update + (-4.7750 * gram + 2.0315 * gram @ gram) @ update
                update = (update.mT if tall else update).float()
                scale = MUON_SCALE * math.sqrt(max(update.shape[1:])) * learning_rate
                for p, u in zip(group, update.unbind(), strict=True):
                    p.mul_(1 - learning_rate * self.weight_decay).sub_(u, alpha=scale)


def learning_rate_at(step: int, steps: int, peak: float, warmup: int = 100, decay_share: float = 0.35) -> float:
    """Warm-up, constant, linear decay to zero: a run can be extended from any checkpoint of the constant phase."""
    decay = min(1.0, (steps - step) / (decay_share * steps))
    return peak * min(1.0, (step + 1) / warmup) * decay
