"""Routers from the effect of every single change, a rival of the published labels.

A label of the search says which path happened to answer one question right. Here each block of each training question
is asked what skipping, executing or repeating it does to the probability of the right answer, all other blocks as they
are; the routers learn to predict these effects. Luck differs from question to question and averages out in the
prediction; what remains is what can be known from the prompt.

A predicted effect less a price a block application is the logit of an action, so that the greedy decision weighs
probability against length. The price sits in the output biases: one training gives the whole curve of accuracy against
layers, and the price is chosen on validation questions (`with_price`).

Effects hold around a path. The first round measures them around the default path, later ones around the routers'
own decisions, and the routers learn from all rounds together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drllm import tasks
from drllm.rollout import Prompt
from drllm.router_modules import StackedRouters
from train_models.paths import EXECUTE, Path, path_to_layer_indices

NUM_ACTIONS = 3
LOGIT_SCALE = (
    10.0  # logits are effects on a probability times this, so that the softmax of the control knob means something
)


@dataclass(frozen=True)
class Answered:
    """A prompt and the tokens of its right answer, in the form the model is asked for."""

    prompt: Prompt
    answer_ids: tuple[int, ...]

    @classmethod
    def of(cls, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Answered:
        question = prompt.question
        is_math = tasks.SETS[question.set].kind == "math"
        text = f" \\boxed{{{question.answer}}}" if is_math else f" {question.answer}"
        answer_ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return cls(prompt, tuple(answer_ids))


@dataclass
class EffectRound:
    """What one round measured: probabilities float32 [N, L, 3] of the right answers with block l's action replaced (nan
    where no block would run), around `paths`; and what the routers read there, windows [N, L, W, d] and mask [N, W].
    """

    paths: list[Path]
    probabilities: torch.Tensor
    windows: torch.Tensor
    window_mask: torch.Tensor

    def effects(self) -> torch.Tensor:
        """[N, L, 3]: the change of the probability against executing the block."""
        return self.probabilities - self.probabilities[:, :, EXECUTE : EXECUTE + 1]


@torch.inference_mode()
def measure(
    routed: PreTrainedModel, questions: Sequence[Answered], paths: Sequence[Path], batch_size: int = 64
) -> EffectRound:
    """One `EffectRound` over `questions` around `paths`, one path each.

    Costs a pass along each path and, for each block, one for each other action from that block on: about L times a
    whole pass.
    """
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt.input_ids))
    num_blocks = routed.config.num_hidden_layers
    probabilities = torch.full((len(questions), num_blocks, NUM_ACTIONS), float("nan"))
    windows, masks = [torch.empty(0)] * len(questions), [torch.empty(0)] * len(questions)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch, batch_paths = [questions[i] for i in chosen], [paths[i] for i in chosen]
        measured, inputs, mask = _measure_batch(routed, batch, batch_paths)
        for row, i in enumerate(chosen):
            probabilities[i], windows[i], masks[i] = measured[row], inputs[row], mask[row]
    return EffectRound(list(paths), probabilities, torch.stack(windows), torch.stack(masks))


def _measure_batch(routed, batch: list[Answered], paths: list[Path]):
    """(probabilities [B, L, 3], router inputs [B, L, W, d], window mask [B, W])."""
    ids, length, places, targets = _teacher_forced(batch)
    along = routed.model(
        input_ids=ids,
        layer_indices=[path_to_layer_indices(path) for path in paths],
        prompt_length=length,
        use_cache=False,
        output_hidden_states=True,
        output_router_inputs=True,
    )

    def probability(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        answers = hidden[torch.arange(len(rows))[:, None], places[rows]]
        log_p = routed.lm_head(answers).float().log_softmax(-1).gather(2, targets[rows].clamp_min(0)[..., None])[..., 0]
        return (log_p * (targets[rows] >= 0)).sum(1).exp()

    everything = torch.arange(len(batch))
    current = probability(along.last_hidden_state, everything)
    num_blocks = len(paths[0])
    probabilities = torch.full((len(batch), num_blocks, NUM_ACTIONS), float("nan"))
    for block in range(num_blocks):
        for action in range(NUM_ACTIONS):
            changed, rows = [], []
            for row, path in enumerate(paths):
                other = (*path[:block], action, *path[block + 1 :])
                if other == path:
                    probabilities[row, block, action] = current[row]
                elif sum(other):
                    # Below the changed block nothing changes: start from its input on the unchanged path.
                    changed.append(path_to_layer_indices((0,) * block + other[block:]))
                    rows.append(row)
            if rows:
                rows = torch.tensor(rows)
                inputs = along.hidden_states[block][rows]
                hidden = routed.model(inputs_embeds=inputs, layer_indices=changed, use_cache=False).last_hidden_state
                probabilities[rows, block, action] = probability(hidden, rows)
    return probabilities, along.router_inputs, along.window_mask


def _teacher_forced(batch: list[Answered]):
    """Right-padded prompt + answer [B, T], prompt lengths [B], and for each answer token where it is predicted and its
    id [B, A], -1 beyond the answer. Causal attention needs no mask for padding on the right."""
    rows = [(*each.prompt.input_ids, *each.answer_ids[:-1]) for each in batch]
    ids = torch.zeros(len(batch), max(map(len, rows)), dtype=torch.long)
    longest = max(len(each.answer_ids) for each in batch)
    places = torch.zeros(len(batch), longest, dtype=torch.long)
    targets = torch.full((len(batch), longest), -1)
    for row, (each, tokens) in enumerate(zip(batch, rows, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        count = len(each.answer_ids)
        places[row, :count] = len(each.prompt.input_ids) - 1 + torch.arange(count)
        targets[row, :count] = torch.tensor(each.answer_ids)
    return ids, torch.tensor([len(each.prompt.input_ids) for each in batch]), places, targets


def fit(
    routers: StackedRouters,
    rounds: Sequence[EffectRound],
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
) -> float:
    """Least squares on the effects of all rounds, AdamW with cosine decay; returns the last epoch's mean loss.

    The logits of skip and repeat, less that of execute, are fitted to their effects times `LOGIT_SCALE`.
    """
    windows = torch.cat([each.windows for each in rounds])
    mask = torch.cat([each.window_mask for each in rounds])
    targets = LOGIT_SCALE * torch.cat([each.effects() for each in rounds])
    known = targets.isfinite()
    targets = targets.nan_to_num()
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(targets) // batch_size)
    optimizer = torch.optim.AdamW(routers.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        losses = []
        for chosen in torch.randperm(len(targets), generator=generator).split(batch_size):
            logits = routers(windows[chosen], mask[chosen])["logits"]
            relative = logits - logits[:, :, EXECUTE : EXECUTE + 1]
            loss = ((relative - targets[chosen]).square() * known[chosen]).sum() / known[chosen].sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def with_price(routers: Sequence[nn.Module], price: float, margin: float = 0.0) -> None:
    """Moves the output biases: `price`, in probability a block application, off every action's logit, and `margin` onto
    that of executing, so that only effects that stand out from the errors of prediction change a path."""
    for router in routers:
        bias = router.layers[-1].bias
        bias -= LOGIT_SCALE * price * torch.arange(NUM_ACTIONS, dtype=bias.dtype, device=bias.device)
        bias[EXECUTE] += LOGIT_SCALE * margin
