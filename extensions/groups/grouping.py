"""Groups of questions: alike in what skipping a block does to them, or alike in what the routers read."""

from __future__ import annotations

import torch

KERNEL_WIDTH = 1.0  # of standardised states whose squared distance is a mean over features
KERNEL_NOISE = 3.0  # variance of one question's own effect over that of what questions share


def standardised_states(windows: torch.Tensor, window_mask: torch.Tensor) -> torch.Tensor:
    """The last and the mean window of every router's input, standardised, [N, 2 L d].

    Squared distances of rows are means over features.

    Args:
        windows, window_mask: what the routers read, [N, L, W, d] and bool [N, W].
    """
    last = window_mask.sum(1) - 1
    valid = window_mask[:, None, :, None]
    mean = (windows * valid).sum(2) / valid.sum(2)
    features = torch.cat([windows[torch.arange(len(windows)), :, last], mean], dim=2).flatten(1).float()
    return (features - features.mean(0)) / (features.std(0) + 1e-6) / features.shape[1] ** 0.5


def smoothed(effects: torch.Tensor, windows: torch.Tensor, window_mask: torch.Tensor) -> torch.Tensor:
    """Each question's effects as its neighbours predict them, its own left out; [N, L].

    Kernel ridge regression (Gaussian kernel) on the last and the mean window of every router's input, solved for all
    questions at once; leaving one out has a closed form. Memory grows with N^2 and time with N^3: seconds at 6,000.

    Args:
        effects: [N, L], what skipping block l does to the reward of each question.
        windows, window_mask: what the routers read, [N, L, W, d] and bool [N, W].
    """
    features = standardised_states(windows, window_mask)
    kernel = torch.exp(-torch.cdist(features, features).square() / KERNEL_WIDTH)
    regularised = kernel + KERNEL_NOISE * torch.eye(len(kernel))
    smoother = torch.linalg.solve(regularised, kernel).T  # K (K + noise)^-1
    own = smoother.diagonal()[:, None]
    mean_effects = effects.mean(0)
    centred = effects - mean_effects
    return (smoother @ centred - own * centred) / (1 - own) + mean_effects


def groups_of(effects: torch.Tensor, count: int, seed: int, steps: int = 50) -> torch.Tensor:
    """k-means of `effects` [N, L] into at most `count` groups, started by k-means++; the group of each question, [N].

    There are fewer groups where there are fewer distinct rows.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = effects[torch.randint(len(effects), (1,), generator=generator)]
    while len(centres) < min(count, len(effects)):
        distance = torch.cdist(effects, centres).min(1).values.square()
        if not distance.any():
            break
        centres = torch.cat([centres, effects[torch.multinomial(distance, 1, generator=generator)]])
    for _ in range(steps):
        nearest = torch.cdist(effects, centres).argmin(1)
        members = [nearest == number for number in range(len(centres))]
        centres = torch.stack([effects[m].mean(0) if m.any() else c for m, c in zip(members, centres, strict=True)])
    return torch.cdist(effects, centres).argmin(1)
