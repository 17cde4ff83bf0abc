import pytest
import torch

from train_models import RouterBlock, pool_windows, route
from train_models.routing import action_probabilities


def naive_windows(tokens: torch.Tensor, num_windows: int) -> list[torch.Tensor]:
    """Window means of [T, d], one slice at a time."""
    count = min(num_windows, len(tokens))
    size = len(tokens) // count
    return [tokens[start : start + size].mean(0) for start in range(0, count * size, size)]


@pytest.mark.parametrize("padding", ["none", "left", "right", "both"])
def test_pooling_equals_a_loop_over_windows(padding):
    generator = torch.Generator().manual_seed(0)
    for length in range(1, 41):
        left = 3 if padding in ("left", "both") else 0
        right = 5 if padding in ("right", "both") else 0
        hidden = torch.randn(1, left + length + right, 4, generator=generator)
        mask = torch.zeros(1, left + length + right, dtype=torch.bool)
        mask[:, left : left + length] = True
        for num_windows in range(1, 17):
            pooled, valid = pool_windows(hidden, mask, num_windows)
            expected = naive_windows(hidden[0, left : left + length], num_windows)
            assert valid[0].tolist() == [True] * len(expected) + [False] * (num_windows - len(expected))
            torch.testing.assert_close(pooled[0, : len(expected)], torch.stack(expected))
            assert not pooled[0, len(expected) :].any()


@pytest.mark.parametrize(
    ("blocks", "hidden_size", "millions", "share"), [(28, 3072, 11.0, 3.2e9), (32, 4096, 16.8, 8e9)]
)
def test_parameter_counts_of_the_paper(blocks, hidden_size, millions, share):
    with torch.device("meta"):
        parameters = blocks * sum(parameter.numel() for parameter in RouterBlock(hidden_size).parameters())
    assert round(parameters / 1e6, 1) == millions
    assert parameters / share < 0.005


def test_one_vote_a_window():
    router = RouterBlock(4, width=8)
    router.reset_parameters(torch.Generator().manual_seed(0))
    windows = torch.randn(2, 5, 4)
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    logits = router(windows, valid)
    torch.testing.assert_close(logits[0], router.layers(windows[0]).mean(0))
    torch.testing.assert_close(logits[1], router.layers(windows[1, :2]).mean(0))
    assert logits.dtype == torch.float32


def test_initialisation():
    router = RouterBlock(64, width=32, depth=3)
    router.reset_parameters(torch.Generator().manual_seed(0))
    linear = [layer for layer in router.layers if isinstance(layer, torch.nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(32, 64), (32, 32), (3, 32)]
    for layer in linear:
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert not layer.bias.any()
        assert 0.8 * bound < layer.weight.abs().max() <= bound
    assert len(RouterBlock(64, depth=1).layers) == 1, "a linear probe"


def test_the_knob():
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    router = logits.softmax(-1)
    one_hot = torch.eye(3)
    for control, expected in [
        (-1.0, one_hot[:1]),
        (-0.75, 0.5 * one_hot[:1] + 0.5 * router),
        (-0.5, router),
        (0.0, 0.5 * router + 0.5 * one_hot[1:2]),
        (0.5, one_hot[1:2]),
        (0.75, 0.5 * one_hot[1:2] + 0.5 * one_hot[2:]),
        (1.0, one_hot[2:]),
    ]:
        torch.testing.assert_close(action_probabilities(logits, control), expected, rtol=0, atol=1e-6)
    assert [route(logits, control).item() for control in (-1.0, -0.5, 0.5, 1.0)] == [0, 0, 1, 2]
    assert route(torch.tensor([[-9.0, 0.0, 9.0]])).item() == 2, "the pure router is the default"
    with pytest.raises(ValueError, match=r"1\.5.*lies in \[-1, 1\]"):
        route(logits, 1.5)
