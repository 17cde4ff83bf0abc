"""FlexiDepth (Luo et al. 2025, arXiv 2503.23798): a router and a small adapter per block, for each token.

In the routed blocks (the upper half of the model, or all) a router reads a token's hidden state and gives a gate g in
(0, 1). A token with g >= 0.5 takes the block, whose update is scaled by g; another one takes the adapter, scaled by
1 - g. The keys and values of skipped tokens are still computed, so that later tokens can attend to them. Routers and
adapters learn by the language-model loss and the skipping loss, the mean over tokens of the squared sum of a token's
gates, whose weight follows the budget; the base is frozen. Layers are counted per token.

There is no path: two tokens of one prompt run through different blocks. `score` and `answer` are its forward passes,
on top of the frozen model (`GatedBlocks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from drllm.questions.likelihood import LikelihoodPrompt
from drllm.questions.prompts import Prompt
from drllm.rollouts.engine import Request, RolloutEngine
from drllm.rollouts.likelihood import PackedBatch, PackedRow
from drllm.rollouts.scores import Scores
from extensions.baselines.bench import Bench
from extensions.baselines.gated_blocks import GatedBaseline, GatedBlocks, GateTraining
from extensions.baselines.interface import Tensors
from extensions.baselines.outcomes import Outcome
from train_models.paths import default_path

REDUCTION = 16  # of the widths of router and adapter, as in the paper
SMALLEST_WIDTH = 8
INITIAL_LOGIT = 3.0  # gates near 1: the base model at first


class TokenGate(nn.Module):
    """Router and adapter of one block, on RMS-normalised hidden states."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        router = max(SMALLEST_WIDTH, hidden_size // REDUCTION)
        adapter = max(SMALLEST_WIDTH, intermediate_size // REDUCTION)
        self.router = nn.Sequential(nn.Linear(hidden_size, router), nn.GELU(), nn.Linear(router, 1))
        self.gate_proj = nn.Linear(hidden_size, adapter, bias=False)
        self.up_proj = nn.Linear(hidden_size, adapter, bias=False)
        self.down_proj = nn.Linear(adapter, hidden_size, bias=False)
        nn.init.constant_(self.router[-1].bias, INITIAL_LOGIT)
        nn.init.zeros_(self.down_proj.weight)  # an untrained adapter changes nothing

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(gates [B, T], adapter output [B, T, d]) of hidden states [B, T, d]."""
        normed = F.rms_norm(hidden.float(), hidden.shape[-1:])
        adapted = self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return self.router(normed)[..., 0].sigmoid(), adapted.to(hidden.dtype)


class TokenGates(GatedBlocks):
    """A `TokenGate` for each of the blocks from `first` on."""

    def __init__(self, config, first: int) -> None:
        super().__init__()
        self.first = first
        self.modules_of_blocks = nn.ModuleList(
            TokenGate(config.hidden_size, config.intermediate_size) for _ in range(first, config.num_hidden_layers)
        )
        self.start()

    def start(self) -> None:
        """See `GatedBlocks.start`."""
        self._gates: list[torch.Tensor] = []

    def output(self, block: int, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Per token the block's update scaled by the gate, or the adapter's."""
        if block < self.first:
            return after
        gate, adapted = self.modules_of_blocks[block - self.first](before)
        if self.real is not None:  # while decoding, nothing is counted
            self._gates.append(gate)
        executed = (gate >= 0.5)[..., None]
        gate = gate[..., None].to(before.dtype)
        return before + torch.where(executed, gate * (after - before), (1 - gate) * adapted)

    def executed(self) -> torch.Tensor:
        """Executed blocks of each token of the last forward pass, [B, T]."""
        return self.first + (torch.stack(self._gates) >= 0.5).sum(0)

    def blocks(self) -> torch.Tensor:
        """Executed blocks per real token."""
        return self.executed()[self.real].float()

    def penalty(self, price: torch.Tensor) -> torch.Tensor:
        """The skipping loss (equation 5 of the paper); its weight is e^price thousandths."""
        squared = torch.stack(self._gates).sum(0)[self.real].square().mean()
        return 1e-3 * price.exp() * squared

    def shift(self, amount: float) -> None:
        """See `GatedBlocks.shift`."""
        for module in self.modules_of_blocks:
            module.router[-1].bias.add_(amount)


@dataclass(frozen=True)
class FlexiDepth(GatedBaseline):
    """See the top of this file.

    training: settings; the weight of the skipping loss starts at the paper's 0.001 and follows the budget.
    every_block: route all blocks instead of the upper half.
    """

    training: GateTraining = field(default_factory=lambda: GateTraining(gain=10.0))
    every_block: bool = False

    name = "FlexiDepth"

    def new_gates(self, routed: PreTrainedModel, seed: int = 0) -> TokenGates:
        """See `GatedBaseline.new_gates`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = 0 if self.every_block else routed.config.num_hidden_layers // 2
            return TokenGates(routed.config, first).to(routed.device)

    def outcome(self, bench: Bench, fitted: Tensors) -> Outcome:
        """See `Baseline.outcome`."""
        own = GatedModel(bench.routed, self.trained_gates(bench.routed, fitted))
        return bench.with_own_forward(self.name, own, fitted)


@dataclass
class GatedModel:
    """`OwnForward` of `routed` with gates."""

    routed: PreTrainedModel
    gates: TokenGates

    @torch.inference_mode()
    def score(self, prompts: Sequence[LikelihoodPrompt], batch_size: int) -> list[tuple[Scores, float]]:
        """See `OwnForward.score`; the tokens that are counted are those of the context and of all options."""
        results: list = [None] * len(prompts)
        packed = [PackedRow.of(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda index: len(packed[index].tokens))
        every_block = list(range(self.routed.config.num_hidden_layers))
        with self.gates.attached(self.routed):
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = PackedBatch([packed[index] for index in chosen], self.routed)
                self.gates.start()
                self.gates.real = batch.segments >= 0
                hidden = self.routed.model(
                    input_ids=batch.tokens,
                    attention_mask=batch.masks(self.routed),
                    position_ids=batch.positions,
                    layer_indices=every_block,
                    use_cache=False,
                ).last_hidden_state
                scores = batch.option_scores(hidden, self.routed.lm_head)
                for index, values, layers in zip(chosen, scores, self._layers(), strict=True):
                    results[index] = (values, layers)
        return results

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], tokenizer, batch_size: int) -> list[tuple[Scores, float]]:
        """See `OwnForward.answer`; the tokens that are counted are those of the prompt and the response.

        Decoding keeps the keys and values of every block for every token. The response is tokenised again to count.
        """
        engine = RolloutEngine(self.routed, tokenizer, batch_size, reuse_default_states=False)
        path = default_path(engine.num_blocks)
        layers: list[float] = []
        with self.gates.attached(self.routed):
            self.gates.real = None
            rollouts = engine.respond([Request(prompt, path) for prompt in prompts])
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                rows = [
                    [*prompt.input_ids, *tokenizer(rollout.response, add_special_tokens=False)["input_ids"]]
                    for prompt, rollout in zip(prompts[part], rollouts[part], strict=True)
                ]
                self.gates.run(self.routed, rows, [len(row) for row in rows])
                layers += self._layers()
        return [(rollout.scores, count) for rollout, count in zip(rollouts, layers, strict=True)]

    def _layers(self) -> list[float]:
        """Mean of the executed blocks over the real tokens of each row."""
        real = self.gates.real
        return ((self.gates.executed() * real).sum(1) / real.sum(1)).tolist()
