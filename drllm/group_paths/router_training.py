"""Training of the routers on the paths of groups, one round on their own decisions, and when they abstain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from drllm.group_paths.margin_rewards import NUM_ACTIONS, RewardRound
from drllm.training.router_modules import StackedRouters
from train_models.paths import EXECUTE
from train_models.routing import RouterBlock, mean_window

BATCH_SIZE = 32  # questions per optimiser step
PURE_ROUTER = -0.5  # of the knob
KNOB_SLACK = 1e-4  # so that rounding does not turn the weakest decision that is to be kept
LEAST_SPREAD = 1e-6  # of a dimension in which all prompts are alike
REWARD_SCALE = 10  # rewards are small beside cross-entropies; this makes AdamW's epsilon harmless


def imitate(
    routers: StackedRouters,
    along: RewardRound,
    epochs: int,
    learning_rate: float,
    seed: int,
    members: torch.Tensor | None = None,
) -> float:
    """Cross-entropy on the paths of `along`; returns the last epoch's mean loss.

    members: int64, the questions of `along` to train on; default: all.
    """
    targets = torch.tensor(along.paths)
    members = torch.arange(len(targets)) if members is None else members

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        chosen = members[chosen]
        logits = routers(along.windows[chosen], along.window_mask[chosen])["logits"]
        return F.cross_entropy(logits.flatten(0, 1), targets[chosen].flatten())

    return _train(routers, loss, len(members), epochs, learning_rate, seed)


@torch.no_grad()
def knob_that_keeps(routers: StackedRouters, along: RewardRound, members: torch.Tensor, share: float) -> float:
    """The largest knob p in [-0.5, 0.5] at which `share` of the questions still follow the edits of their path.

    From -0.5 to 0.5 the knob mixes the routers with one-hot execute (Appendix B), so a router deviates from execute
    only where it is sure enough. With a share below 1 the routers abstain from edits where they are less sure than on
    most questions like those of their training.

    Args:
        along: paths, and what the routers read along them.
        members: int64, questions of `along` that no router was trained on. Those on the default path do not count.
        share: in [0, 1].
    """
    paths = torch.tensor(along.paths)[members]
    logits = [
        routers(along.windows[chosen], along.window_mask[chosen])["logits"] for chosen in members.split(BATCH_SIZE)
    ]
    probabilities = torch.cat(logits).softmax(-1)
    ahead = probabilities.gather(2, paths[..., None])[..., 0] - probabilities[..., EXECUTE]
    ahead = ahead.masked_fill(probabilities.argmax(2) != paths, -1.0)  # lost at any knob
    is_edited = paths != EXECUTE
    weakest = ahead.masked_fill(~is_edited, math.inf).amin(1)[is_edited.any(1)].sort().values
    if not len(weakest):
        return PURE_ROUTER
    # An edit survives the share t of one-hot execute while its lead (1 - t) exceeds t.
    lead = float(weakest[min(len(weakest) - 1, int((1 - share) * len(weakest)))])
    return PURE_ROUTER + max(0.0, lead / (1 + max(0.0, lead)) - KNOB_SLACK)


@torch.no_grad()
def fit_domains(
    routers: Sequence[RouterBlock], along: RewardRound, members: torch.Tensor, checked: torch.Tensor, share: float
) -> None:
    """Sets the domain of each router: prompts like those that deviate from execute at its block.

    A router at whose block no path deviates executes it for every prompt.

    Args:
        routers: L routers with domains, in the dtype in which they will be used.
        along: paths, and what the routers read along them.
        members: int64, the questions of `along` whose prompts are the domain.
        checked: int64, other questions; the radius is such that `share` of those that deviate are inside.
        share: in [0, 1].
    """
    deviates = torch.tensor(along.paths) != EXECUTE
    for block, router in enumerate(routers):
        inside, held_out = (chosen[deviates[chosen, block]] for chosen in (members, checked))
        if not len(inside):
            router.radius.fill_(-1.0)
            continue
        means = mean_window(along.windows[inside, block], along.window_mask[inside])
        router.centre.copy_(means.mean(0))
        router.spread.copy_(means.std(0, correction=0).clamp(min=LEAST_SPREAD))
        # In the values that were stored, so that a low precision moves no prompt across the radius.
        deviations = (means - router.centre.float().cpu()) / router.spread.float().cpu()
        router.directions.copy_(_principal_directions(deviations, router.domain_rank))
        asked = held_out if len(held_out) else inside
        distances = router.distance(along.windows[asked, block], along.window_mask[asked])
        router.radius.fill_(float(distances.quantile(share)))


def _principal_directions(deviations: torch.Tensor, rank: int) -> torch.Tensor:
    """The matrix A [rank, d] of `RouterBlock.distance`.

    Its rows are eigenvectors of the covariance, shortened so that |z|^2 - |A z|^2 weighs each component by the residual
    variance over its own.

    Args:
        deviations: float32 [N, d].
        rank: components; those beyond d - 1 are zero.
    """
    variances, vectors = torch.linalg.eigh(deviations.T @ deviations / len(deviations))  # in ascending order
    kept = min(rank, len(variances) - 1)
    residual = variances[: len(variances) - kept].mean().clamp(min=LEAST_SPREAD)
    weights = (1 - residual / variances[-kept:].clamp(min=LEAST_SPREAD)).clamp(min=0).sqrt()
    directions = torch.zeros(rank, len(variances))
    directions[:kept] = weights[:, None] * vectors[:, -kept:].T
    return directions


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
