"""Training of the routers on the paths of groups, and one round on their own decisions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from drllm.group_paths.margin_rewards import NUM_ACTIONS, RewardRound
from drllm.training.router_modules import StackedRouters

BATCH_SIZE = 32  # questions per optimiser step
REWARD_SCALE = 10  # rewards are small beside cross-entropies; this makes AdamW's epsilon harmless


def imitate(routers: StackedRouters, along: RewardRound, epochs: int, learning_rate: float, seed: int) -> float:
    """Cross-entropy on the paths of `along`; returns the last epoch's mean loss."""
    targets = torch.tensor(along.paths)

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        logits = routers(along.windows[chosen], along.window_mask[chosen])["logits"]
        return F.cross_entropy(logits.flatten(0, 1), targets[chosen].flatten())

    return _train(routers, loss, len(targets), epochs, learning_rate, seed)


def refine(
    routers: StackedRouters, around: RewardRound, price: float, epochs: int, learning_rate: float, seed: int
) -> float:
    """Maximises the expected reward under the routers' probabilities, less `price` per block application.

    Each block is varied by itself around the paths of `around`; actions that were not measured count as a lost answer.

    Returns:
        The last epoch's mean loss.
    """
    paths = torch.tensor(around.paths)
    extra = torch.arange(NUM_ACTIONS) - paths[..., None]  # applications, against the path's own
    gains = (around.rewards - around.own()[:, None, None]).nan_to_num(-1.0) - price * extra

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        probabilities = routers(around.windows[chosen], around.window_mask[chosen])["logits"].softmax(-1)
        return -REWARD_SCALE * (probabilities * gains[chosen]).sum(-1).mean()

    return _train(routers, loss, len(paths), epochs, learning_rate, seed)


def _train(
    routers: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    count: int,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> float:
    """AdamW with cosine decay over `count` questions, in an order drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    batches = -(-count // BATCH_SIZE)
    optimizer = torch.optim.AdamW(routers.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    losses = [float("nan")]
    for _ in tqdm(range(epochs), desc="training the routers", unit="epoch"):
        losses = []
        for chosen in torch.randperm(count, generator=generator).split(BATCH_SIZE):
            loss = loss_of(chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)
