"""Losses against computations by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from drllm.training.losses import (
    PAPER_COUNTS,
    class_counts,
    effective_number_weights,
    paper_alpha,
    routing_loss,
    scaled_beta,
)


def test_alpha_of_the_papers_counts():
    alpha = effective_number_weights(torch.tensor([4399, 120956, 1457]), beta=0.999)
    assert alpha.tolist() == pytest.approx([0.916, 0.905, 1.179], abs=5e-4)
    assert alpha.mean().item() == pytest.approx(1.0)


def test_alpha_by_hand():
    # (1 - 0.5) / (1 - 0.5^n) for n = 1, 2, 3: 1, 2/3, 4/7; mean 47/63.
    alpha = effective_number_weights(torch.tensor([1, 2, 3]), beta=0.5)
    assert alpha.tolist() == pytest.approx([63 / 47, 42 / 47, 36 / 47])


def test_alpha_limits():
    counts = torch.tensor([10, 80, 40])
    assert effective_number_weights(counts, beta=0.0).tolist() == pytest.approx([1, 1, 1])
    inverse = [1 / 10, 1 / 80, 1 / 40]
    expected = [3 * x / sum(inverse) for x in inverse]
    assert effective_number_weights(counts, beta=1.0).tolist() == pytest.approx(expected)
    assert effective_number_weights(counts, beta=1 - 1e-12).tolist() == pytest.approx(expected, rel=1e-4)


def test_alpha_of_an_absent_class_is_neutral():
    two = effective_number_weights(torch.tensor([10, 80]), beta=0.99)
    three = effective_number_weights(torch.tensor([10, 80, 0]), beta=0.99)
    assert three.tolist() == pytest.approx([*two.tolist(), 1.0])
    assert effective_number_weights(torch.tensor([0, 7, 0])).tolist() == [1, 1, 1]


@pytest.mark.parametrize(("counts", "beta"), [([0, 0, 0], 0.9), ([1, 1, 1], -0.1), ([1, 1, 1], 1.1)])
def test_alpha_refuses(counts, beta):
    with pytest.raises(ValueError):
        effective_number_weights(torch.tensor(counts), beta)


def test_focal_by_hand():
    # Probabilities 0.2, 0.5, 0.3; label 0: alpha 2 * 0.8^2 * -log 0.2.
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3]]))
    alpha = torch.tensor([2.0, 0.5, 1.5])
    loss = routing_loss(logits, torch.tensor([0, 2]), "focal", alpha, gamma=2.0)
    assert loss.tolist() == pytest.approx([2.0 * 0.64 * -math.log(0.2), 1.5 * 0.49 * -math.log(0.3)], rel=1e-5)
    cubed = routing_loss(logits, torch.tensor([0, 2]), "focal", alpha, gamma=3.0)
    assert cubed.tolist() == pytest.approx([2.0 * 0.512 * -math.log(0.2), 1.5 * 0.343 * -math.log(0.3)], rel=1e-5)


def test_rivals_equal_torch():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 7, 3), torch.randint(0, 3, (5, 7))
    alpha = torch.tensor([0.5, 0.7, 1.8])
    flat, target = logits.reshape(-1, 3), labels.reshape(-1)
    ce = F.cross_entropy(flat, target, reduction="none").view(5, 7)
    weighted = F.cross_entropy(flat, target, weight=alpha, reduction="none").view(5, 7)
    assert torch.allclose(routing_loss(logits, labels, "ce"), ce)
    assert torch.allclose(routing_loss(logits, labels, "weighted_ce", alpha), weighted)
    assert torch.allclose(routing_loss(logits, labels, "focal", alpha, gamma=0.0), weighted)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_gradient_is_finite_and_right(gamma):
    certain = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]], requires_grad=True)
    routing_loss(certain, torch.tensor([0, 0]), "focal", torch.ones(3), gamma).sum().backward()
    assert torch.isfinite(certain.grad).all()

    def focal(x):
        # float32 inside, so a finite difference needs a generous step.
        return routing_loss(x, torch.tensor([0, 1, 2]), "focal", torch.tensor([0.5, 1.0, 2.0]), gamma).sum()

    torch.manual_seed(1)
    x = torch.randn(3, 3, requires_grad=True)
    focal(x).backward()
    step = 1e-2
    for i in range(3):
        for j in range(3):
            up, down = x.detach().clone(), x.detach().clone()
            up[i, j] += step
            down[i, j] -= step
            assert ((focal(up) - focal(down)) / (2 * step)).item() == pytest.approx(x.grad[i, j].item(), abs=2e-3)


def test_refusals():
    logits, labels = torch.zeros(1, 3), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="unknown loss"):
        routing_loss(logits, labels, "hinge")
    with pytest.raises(ValueError, match="needs class weights"):
        routing_loss(logits, labels, "focal")


def test_class_counts():
    assert class_counts(torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.int8)).tolist() == [1, 5, 0]


@pytest.mark.parametrize("share", [1, 0.1, 0.03])
def test_scaled_beta_keeps_the_papers_weights_with_fewer_labels(share):
    counts = share * torch.tensor(PAPER_COUNTS, dtype=torch.float64)
    alpha = effective_number_weights(counts, scaled_beta(float(counts.sum())))
    assert alpha.tolist() == pytest.approx(paper_alpha(), abs=0.01)
    if share < 1:  # where the published beta does not
        assert effective_number_weights(counts, 0.999)[2] > 1.5


@pytest.mark.parametrize(("decisions", "beta"), [(126_812, 0.999), (10**9, 0.999), (3780, 0.96645), (100, 0.0), (1, 0)])
def test_scaled_beta(decisions, beta):
    assert scaled_beta(decisions) == pytest.approx(beta, abs=1e-5)


def test_scaled_beta_is_the_published_one_to_three_digits_at_4000_labels():
    assert round(scaled_beta(4000 * 28), 3) == 0.999
