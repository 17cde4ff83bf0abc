"""Groups of questions that are alike in what the routers read."""

from __future__ import annotations

import torch


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


def groups_of(states: torch.Tensor, count: int, seed: int, steps: int = 50) -> torch.Tensor:
    """k-means of `states` [N, d] into at most `count` groups, started by k-means++; the group of each question, [N].

    There are fewer groups where there are fewer distinct rows.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = states[torch.randint(len(states), (1,), generator=generator)]
    while len(centres) < min(count, len(states)):
        distance = torch.cdist(states, centres).min(1).values.square()
        if not distance.any():
            break
        centres = torch.cat([centres, states[torch.multinomial(distance, 1, generator=generator)]])
    for _ in range(steps):
        nearest = torch.cdist(states, centres).argmin(1)
        members = [nearest == number for number in range(len(centres))]
        centres = torch.stack([states[m].mean(0) if m.any() else c for m, c in zip(members, centres, strict=True)])
    return torch.cdist(states, centres).argmin(1)
