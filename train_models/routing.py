"""Routers: which action to take at a block, from a few pooled windows of the prompt (DrLLM, sections 3.1 and 3.3)."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from .paths import EXECUTE, REPEAT, SKIP

NUM_ACTIONS = 3


class PromptWindows(NamedTuple):
    """Where the pooling windows of each row lie; made once per prompt and applied to the input of every router.

    weights: [batch, W, T], the mean over each window as a matrix; valid: bool [batch, W], False where a prompt has
    fewer than W tokens and so fewer windows.
    """

    weights: torch.Tensor
    valid: torch.Tensor

    def pool(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Window means [batch, W, d] of `hidden_states` [batch, T, d]; zeros for windows that are not valid."""
        return self.weights.to(hidden_states.device) @ hidden_states


def prompt_windows(prompt_mask: torch.Tensor, num_windows: int, dtype: torch.dtype) -> PromptWindows:
    """Cuts the prompt of each row into windows.

    A prompt of T tokens has W = min(num_windows, T) contiguous windows of floor(T / W) tokens each, from its first
    token on; the last T mod W tokens are in no window. Padding and completion are outside of `prompt_mask`
    (bool [batch, T]), wherever they lie.
    """
    prompt_mask = prompt_mask.bool()
    length = prompt_mask.sum(dim=1)  # [batch]
    windows = length.clamp(max=num_windows)
    size = (length // windows.clamp(min=1)).clamp(min=1)
    position = prompt_mask.cumsum(dim=1) - 1  # of each token among the prompt tokens of its row
    window_of_token = position // size[:, None]
    window = torch.arange(num_windows, device=prompt_mask.device)
    valid = window[None, :] < windows[:, None]
    inside = (window_of_token[:, None, :] == window[None, :, None]) & prompt_mask[:, None, :] & valid[:, :, None]
    return PromptWindows(inside.to(dtype) / size[:, None, None].to(dtype), valid)


def pool_windows(
    hidden_states: torch.Tensor, prompt_mask: torch.Tensor, num_windows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(window means [batch, W, d], valid [batch, W]) of `hidden_states` [batch, T, d], see `prompt_windows`."""
    windows = prompt_windows(prompt_mask, num_windows, hidden_states.dtype)
    return windows.pool(hidden_states), windows.valid


def mean_window(windows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """float32 [..., d], the mean of the valid windows.

    Args:
        windows: [..., W, d], the pooled hidden states.
        valid: bool [..., W].
    """
    counted = valid.to(windows.device).unsqueeze(-1)
    return (windows.float() * counted).sum(-2) / counted.sum(-2).clamp(min=1)


class RouterBlock(nn.Module):
    """The router of one block: an MLP (Linear-GELU-Linear, 128 wide by default) over each window, one vote per window.

    `depth` counts linear layers: 1 is a linear probe, 2 the published router.
    """

    def __init__(self, hidden_size: int, width: int = 128, depth: int = 2):
        super().__init__()
        sizes = [hidden_size, *[width] * (depth - 1), NUM_ACTIONS]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Xavier-uniform weights and zero biases, as published."""
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
                nn.init.zeros_(layer.bias)

    def forward(self, windows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """float32 logits [..., 3] for skip, execute and repeat: the mean vote of the valid windows.

        Args:
            windows: [..., W, d], the pooled hidden states.
            valid: bool [..., W].
        """
        parameter = self.layers[0].weight
        if callable(parameter):  # of torch's dynamic quantization, which takes float32
            votes = self.layers(windows.float())
        else:
            # An offloaded weight is on "meta" until its hook loads it to where the input is.
            device = windows.device if parameter.is_meta else parameter.device
            votes = self.layers(windows.to(device, parameter.dtype)).float()
        return mean_window(votes, valid)


def action_probabilities(logits: torch.Tensor, control: float) -> torch.Tensor:
    """Probabilities [..., 3] after the control knob p in [-1, 1] (Appendix B).

    [-1, -0.5] mixes one-hot skip with the router, (-0.5, 0.5] the router with one-hot execute, (0.5, 1] execute with
    repeat. p = -0.5 is the pure router and the default, p = 0.5 the base model.
    """
    check_control(control)
    router = logits.float().softmax(-1)
    one_hot = torch.eye(NUM_ACTIONS, device=logits.device)
    if control <= -0.5:
        low, high, share = one_hot[SKIP], router, (control + 1.0) / 0.5
    elif control <= 0.5:
        low, high, share = router, one_hot[EXECUTE], control + 0.5
    else:
        low, high, share = one_hot[EXECUTE], one_hot[REPEAT], (control - 0.5) / 0.5
    return ((1.0 - share) * low + share * high).expand_as(logits)


def route(logits: torch.Tensor, control: float = -0.5) -> torch.Tensor:
    """The greedy action 0, 1 or 2 for `logits` [..., 3] after the control knob."""
    return action_probabilities(logits, control).argmax(-1)


def check_control(control: float) -> None:
    """Raises ValueError unless the knob lies in [-1, 1]."""
    if not -1.0 <= control <= 1.0:
        raise ValueError(f"routing_control is {control}; the knob p lies in [-1, 1], and -0.5 is the pure router")
