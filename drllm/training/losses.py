"""Focal loss with effective-number class weights, and the two losses it is compared with (Figure 7).

All three are one formula,

    loss(p, y) = -alpha_y * (1 - p_y)^gamma * log p_y ,

with p the softmax of a router's three logits (skip, execute, repeat) and y its label:

    focal        alpha from the class counts, gamma as given (2 in the paper)
    weighted_ce  alpha from the class counts, gamma 0
    ce           alpha 1, gamma 0

The mean is over routers and examples, so all decisions have equal weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

NUM_CLASSES = 3  # skip, execute, repeat: the values of a path are the class indices
LOSSES = ("focal", "weighted_ce", "ce")

PAPER_BETA = 0.999  # Section 3
PAPER_COUNTS = (4399, 120956, 1457)  # skip, execute, repeat among the paper's training labels (Appendix C)


def class_counts(labels: torch.Tensor) -> torch.Tensor:
    """Count how often each class occurs in `labels` (any shape, values 0/1/2): float64 [3]."""
    return torch.bincount(labels.reshape(-1).long(), minlength=NUM_CLASSES).double()


def effective_number_weights(counts: torch.Tensor, beta: float = 0.999) -> torch.Tensor:
    """Class weights from the effective number of samples (Cui et al. 2019; Section 3 of the paper).

    alpha_c = (1 - beta) / (1 - beta^{n_c}), then divided by their mean over the classes that occur. beta = 0
    gives equal weights; beta = 1 is the limit, inverse frequency. A class without labels has no
    effective number; it gets the neutral weight 1 and is left out of the mean.

    Args:
        counts: [3] labels per class, from the training split.
        beta: a number in [0, 1].

    Returns:
        float32 [3], mean 1 over the classes that occur.

    Raises:
        ValueError: beta outside [0, 1], or no label at all.
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; it must lie in [0, 1]")
    counts = torch.as_tensor(counts, dtype=torch.float64)
    present = counts > 0
    if not present.any():
        raise ValueError("cannot weight classes: there are no labels")
    n = counts[present]
    # -expm1(n log beta) = 1 - beta^n without losing digits for beta close to 1.
    effective = n if beta == 1.0 else -torch.expm1(n * torch.log(torch.tensor(beta, dtype=torch.float64)))
    inverse = 1.0 / effective
    weights = torch.ones_like(counts)
    weights[present] = inverse / inverse.mean()
    return weights.float()


def paper_alpha() -> list[float]:
    """The paper's class weights of skip, execute and repeat: about 0.916, 0.905 and 1.179."""
    return effective_number_weights(torch.tensor(PAPER_COUNTS), PAPER_BETA).tolist()


def scaled_beta(decisions: float) -> float:
    """The beta that gives `decisions` training decisions the class weights that the paper has at its own number.

    The weights depend on n_c (1 - beta), so beta = 1 - 0.001 max(1, 126812 / decisions); at fewer than 127 decisions 0,
    which means equal weights. At the paper's number and above it is the published 0.999.
    """
    return max(0.0, 1 - (1 - PAPER_BETA) * max(1.0, sum(PAPER_COUNTS) / decisions))


def routing_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    kind: str = "focal",
    alpha: torch.Tensor | None = None,
    gamma: float = 2.0,
) -> torch.Tensor:
    """The loss of every routing decision, unreduced.

    Args:
        logits: [..., 3].
        labels: [...] with values 0/1/2.
        kind: one of `LOSSES`.
        alpha: [3] class weights (`effective_number_weights`); unused by "ce", required by the others.
        gamma: focusing exponent, used by "focal" alone.

    Returns:
        float32 [...].

    Raises:
        ValueError: an unknown kind, or no alpha where one is needed.
    """
    if kind not in LOSSES:
        raise ValueError(f"unknown loss {kind!r}; there are {', '.join(LOSSES)}")
    log_p = F.log_softmax(logits.float(), dim=-1)
    log_p_true = log_p.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    if kind == "ce":
        return -log_p_true
    if alpha is None:
        raise ValueError(f"the loss {kind!r} needs class weights")
    weights = alpha.to(log_p)[labels.long()]
    if kind == "weighted_ce":
        return -weights * log_p_true
    # expm1 keeps the digits of 1 - p when p is close to 1; the clamp keeps the gradient of its power finite
    # for every gamma when p rounds to 1.
    one_minus_p = -torch.expm1(log_p_true)
    one_minus_p = one_minus_p.clamp_min(torch.finfo(log_p.dtype).tiny)
    return -weights * one_minus_p.pow(gamma) * log_p_true
