"""Gates on the blocks of a frozen model, and their training: what MindSkip and FlexiDepth share.

A `GatedBlocks` sees the input and the output of each block through forward hooks and replaces the output. All blocks
are computed and then selected, which gives the same hidden states as not computing the skipped ones: attention over
all keys and values is what a token-level method computes, too, and a sequence-level gate takes a whole row.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from drllm.files import write_state
from extensions.baselines.interface import Answered, Cost, Tensors

if TYPE_CHECKING:
    from extensions.baselines.bench import Bench

SAVE_SECONDS = 60  # between two states of an unfinished training
FEWEST_STEPS = 150  # a shorter training does not raise the price faster
DAMPING = 10  # steps' worth of price that the present excess adds
CALIBRATION_RANGE, CALIBRATION_STEPS, CALIBRATION_ERROR, CALIBRATION_BATCH = 4.0, 10, 0.02, 16


class GatedBlocks(nn.Module):
    """Trainable modules on top of a frozen model's blocks.

    Attributes:
        real: bool [B, T], the tokens of the batch that are not padding; set by the caller before a forward pass.
        readable: bool [B, T], the tokens that a sequence-level router may read, which are the prompt's.
    """

    real: torch.Tensor | None = None
    readable: torch.Tensor | None = None

    def output(self, block: int, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """What replaces the output `after` of a block whose input is `before`; all [B, T, d]."""
        raise NotImplementedError

    def start(self) -> None:
        """Forgets the gates of the last forward pass."""
        raise NotImplementedError

    def blocks(self) -> torch.Tensor:
        """Executed blocks of the last forward pass, [B] or one entry per real token; differentiable."""
        raise NotImplementedError

    def penalty(self, price: torch.Tensor) -> torch.Tensor:
        """The price of the blocks of the last forward pass, in nats."""
        raise NotImplementedError

    def shift(self, amount: float) -> None:
        """Adds a constant to the logits of all gates."""
        raise NotImplementedError

    @contextlib.contextmanager
    def attached(self, routed: PreTrainedModel) -> Iterator[None]:
        """Within it the blocks of `routed` have these gates."""

        def hook_of(block: int):
            return lambda layer, arguments, output: self.output(block, arguments[0], output)

        hooks = [layer.register_forward_hook(hook_of(block)) for block, layer in enumerate(routed.model.layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def run(self, routed: PreTrainedModel, rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int]):
        """One forward pass over right-padded rows of tokens; hidden states [B, T, d] after the final norm."""
        lengths = torch.tensor([len(row) for row in rows], device=routed.device)
        places = torch.arange(int(lengths.max()), device=routed.device)
        tokens = torch.tensor([list(row) + [0] * (len(places) - len(row)) for row in rows], device=routed.device)
        self.real = places < lengths[:, None]
        self.readable = places < torch.tensor(prompt_lengths, device=routed.device)[:, None]
        self.start()
        # Causal attention: no real token sees the padding on its right.
        every_block = list(range(routed.config.num_hidden_layers))
        return routed.model(input_ids=tokens, layer_indices=every_block, use_cache=False).last_hidden_state


@dataclass(frozen=True)
class GateTraining:
    """Settings of the training.

    Attributes:
        epochs: passes over the training questions.
        batch_size: questions per optimiser step.
        learning_rate: learning rate of AdamW, with cosine decay.
        gain: how far the price would rise over the training if nothing were saved.
        calibration_questions: questions on which the budget is met exactly after the training; 0: as trained.
    """

    epochs: int = 6
    batch_size: int = 16
    learning_rate: float = 1e-3
    gain: float = 1.0
    calibration_questions: int = 64


class GatedBaseline:
    """A `Baseline` that trains gates; a subclass says which, and how they answer."""

    training: GateTraining

    def new_gates(self, routed: PreTrainedModel, seed: int = 0) -> GatedBlocks:
        """Untrained gates, on the device of `routed`."""
        raise NotImplementedError

    def fit(self, bench: Bench, skips: int, seed: int, progress: FilePath) -> tuple[Tensors, Cost]:
        """See `Baseline.fit`."""
        gates = self.new_gates(bench.routed, seed)
        target = bench.num_blocks - skips
        seconds = train_gates(gates, bench.routed, bench.training, target, self.training, seed, progress)
        tensors = gates.state_dict()
        return tensors, Cost(sum(tensor.numel() for tensor in tensors.values()), seconds)

    def trained_gates(self, routed: PreTrainedModel, fitted: Tensors) -> Any:
        """The gates that `fit` returned."""
        gates = self.new_gates(routed)
        gates.load_state_dict(fitted)
        return gates


def train_gates(
    gates: GatedBlocks,
    routed: PreTrainedModel,
    questions: Sequence[Answered],
    target: float,
    settings: GateTraining,
    seed: int,
    progress: FilePath,
) -> float:
    """Trains `gates` by the language-model loss of the gold answers and a price per block; the base stays frozen.

    Args:
        target: executed blocks per sequence or token at which the price stays as it is.
        progress: keeps the state of the training; a stopped one is resumed from it.

    Returns:
        Seconds of training, those before a stop included.
    """
    optimizer = torch.optim.AdamW(gates.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    batches = -(-len(questions) // settings.batch_size)
    step, price, seconds = 0, 0.0, 0.0  # the price of a block, in nats
    if progress.exists():
        state = torch.load(progress, map_location=routed.device, weights_only=True)
        gates.load_state_dict(state["gates"])
        optimizer.load_state_dict(state["optimizer"])
        step, price, seconds = state["step"], state["price"], state["seconds"]
    total = settings.epochs * batches
    gain = settings.gain / max(total, FEWEST_STEPS)
    budget = max(1.0, routed.config.num_hidden_layers - target)
    start = saved = time.perf_counter() - seconds
    bar = tqdm(total=total, initial=step, desc=f"training {type(gates).__name__}", unit="step", mininterval=1)
    with bar, gates.attached(routed):
        while step < total:
            epoch, batch = divmod(step, batches)
            order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(1000 * seed + epoch))
            chosen = [questions[index] for index in order.split(settings.batch_size)[batch].tolist()]
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(step / total * math.pi))
            loss = language_model_loss(gates, routed, chosen)
            blocks = gates.blocks().mean()
            excess = (blocks.item() - target) / budget
            # The second term damps: the price alone would swing around the target.
            (loss + gates.penalty(torch.tensor(price + DAMPING * gain * excess))).backward()
            optimizer.step()
            optimizer.zero_grad()
            price += gain * excess
            step += 1
            bar.set_postfix(loss=f"{loss.item():.3f}", blocks=f"{blocks.item():.2f}", price=f"{price:.3f}")
            bar.update()
            if time.perf_counter() - saved > SAVE_SECONDS:
                saved = time.perf_counter()
                state = {"gates": gates.state_dict(), "optimizer": optimizer.state_dict()}
                write_state(progress, state | {"step": step, "price": price, "seconds": saved - start})
    if settings.calibration_questions:
        calibrate(gates, routed, questions[:: max(1, len(questions) // settings.calibration_questions)], target)
    return time.perf_counter() - start


@torch.no_grad()
def calibrate(gates: GatedBlocks, routed: PreTrainedModel, questions: Sequence[Answered], target: float) -> float:
    """Shifts all gates by one constant until `questions` execute `target` blocks on average; returns the constant.

    So that methods are compared at one budget: a training ends near its target, not on it.
    """

    def blocks() -> float:
        counts = []
        for start in range(0, len(questions), CALIBRATION_BATCH):
            part = questions[start : start + CALIBRATION_BATCH]
            prompts = [question.prompt.input_ids for question in part]
            gates.run(routed, prompts, [len(prompt) for prompt in prompts])
            counts.append(gates.blocks())
        return torch.cat(counts).mean().item()

    low, high, shift = -CALIBRATION_RANGE, CALIBRATION_RANGE, 0.0
    with gates.attached(routed):
        for _ in range(CALIBRATION_STEPS):
            executed = blocks()
            if abs(executed - target) < CALIBRATION_ERROR:
                break
            low, high = (low, shift) if executed > target else (shift, high)
            middle = (low + high) / 2
            gates.shift(middle - shift)
            shift = middle
    return shift


def language_model_loss(gates: GatedBlocks, routed: PreTrainedModel, questions: Sequence[Answered]) -> torch.Tensor:
    """Mean cross-entropy of the tokens of the gold answers, in nats, with the gates attached."""
    prompts = [len(question.prompt.input_ids) for question in questions]
    rows = [[*question.prompt.input_ids, *question.answer_ids] for question in questions]
    hidden = gates.run(routed, [row[:-1] for row in rows], prompts)
    read = torch.cat([hidden[row, prompt - 1 : len(rows[row]) - 1] for row, prompt in enumerate(prompts)])
    answers = torch.tensor([token for question in questions for token in question.answer_ids], device=hidden.device)
    return F.cross_entropy(routed.lm_head(read).float(), answers)
