"""Groups of states."""

import torch

from extensions.groups.grouping import groups_of


def test_groups_are_the_clusters():
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(90) % 3
    states = torch.eye(3)[kinds] + 0.05 * torch.randn(90, 3, generator=generator)
    groups = groups_of(states, 3, seed=0)
    assert len({(kind, group) for kind, group in zip(kinds.tolist(), groups.tolist(), strict=True)}) == 3
    assert torch.equal(groups, groups_of(states, 3, seed=0))
    assert groups_of(torch.zeros(4, 3), 20, seed=0).unique().numel() == 1, "fewer groups where there are fewer kinds"
