"""MindSkip (Router-Tuning, He et al. 2024, arXiv 2410.13184): one linear router per block, for a whole sequence.

Router l reads the mean of the prompt's hidden states before block l and decides, once per sequence, whether the block
runs: sigmoid of a linear function, threshold 0.5. Routers learn by the language-model loss with straight-through gates
and a price on executed blocks that follows the budget; the base is frozen. A decision is one action per block and
prompt, so the result is a path, and everything that scores paths scores it.

The authors route attention sublayers by default. Here the whole block is routed, because the common budget is counted
in blocks. Hidden states are RMS-normalised before the mean, so that one learning rate suits all blocks and a first
token of huge norm does not hide the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from drllm.rollouts.rewards import AnyPrompt
from extensions.baselines.bench import Bench
from extensions.baselines.gated_blocks import GatedBaseline, GatedBlocks, GateTraining
from extensions.baselines.interface import Tensors
from extensions.baselines.outcomes import Outcome
from train_models.paths import Path

INITIAL_LOGIT = 1.0  # every block runs at first


class SequenceGates(GatedBlocks):
    """One linear router per block: weight [L, d] and bias [L]."""

    def __init__(self, num_blocks: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_blocks, hidden_size))
        self.bias = nn.Parameter(torch.full((num_blocks,), INITIAL_LOGIT))
        self.start()

    def start(self) -> None:
        """See `GatedBlocks.start`."""
        self._gates: list[torch.Tensor] = []

    def output(self, block: int, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """The block's output in rows that execute it, its input in the others."""
        normed = F.rms_norm(before.float(), before.shape[-1:])
        readable = self.readable[..., None]
        mean = (normed * readable).sum(1) / readable.sum(1)
        probability = (mean @ self.weight[block] + self.bias[block]).sigmoid()
        gate = (probability >= 0.5).float() + probability - probability.detach()  # straight through
        self._gates.append(gate)
        return before + gate[:, None, None].to(before.dtype) * (after - before)

    def decisions(self) -> torch.Tensor:
        """Whether each row of the last forward pass executes each block, int [B, L]: 0 or 1."""
        return torch.stack(self._gates, 1).detach().round().int()

    @torch.inference_mode()
    def paths(self, routed: PreTrainedModel, prompts: Sequence[AnyPrompt], batch_size: int = 16) -> list[Path]:
        """One path per prompt, in their order."""
        paths: list[Path] = [()] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].input_ids))
        with self.attached(routed):
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                rows = [prompts[index].input_ids for index in chosen]
                self.run(routed, rows, [len(row) for row in rows])
                for index, decided in zip(chosen, self.decisions().tolist(), strict=True):
                    paths[index] = tuple(decided)
        return paths

    def blocks(self) -> torch.Tensor:
        """Executed blocks per sequence, [B]."""
        return torch.stack(self._gates, 1).sum(1)

    def penalty(self, price: torch.Tensor) -> torch.Tensor:
        """The price of the mean number of executed blocks."""
        return price * self.blocks().mean()

    def shift(self, amount: float) -> None:
        """See `GatedBlocks.shift`."""
        self.bias.add_(amount)


@dataclass(frozen=True)
class MindSkip(GatedBaseline):
    """See the top of this file. training: settings; the price starts at 0 and follows the budget."""

    training: GateTraining = field(default_factory=GateTraining)

    name = "MindSkip"

    def new_gates(self, routed: PreTrainedModel, seed: int = 0) -> SequenceGates:
        """See `GatedBaseline.new_gates`; all begin alike."""
        return SequenceGates(routed.config.num_hidden_layers, routed.config.hidden_size).to(routed.device)

    def outcome(self, bench: Bench, fitted: Tensors) -> Outcome:
        """See `Baseline.outcome`."""
        gates: SequenceGates = self.trained_gates(bench.routed, fitted)
        return bench.along(gates.paths(bench.routed, bench.prompts, bench.batch_size), self.name)
