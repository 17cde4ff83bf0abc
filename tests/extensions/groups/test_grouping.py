"""Smoothing over neighbours, and groups."""

import torch

from extensions.groups.grouping import groups_of, smoothed
from tests.search_toys import toy_windows


def test_neighbours_leave_out_the_question_itself():
    windows, mask = toy_windows(60)
    effects = torch.randn(60, 2, generator=torch.Generator().manual_seed(2))
    together = smoothed(effects, windows, mask)
    for index in (0, 7):
        changed = effects.clone()
        changed[index] += 5.0
        # The question's own effect acts through the mean over all questions alone.
        moved = (smoothed(changed, windows, mask) - together)[index]
        assert moved.abs().max() < 5.0 / 60 + 0.02


def test_neighbours_see_what_is_shared_and_not_luck():
    windows, mask = toy_windows(400)
    shared = torch.stack([windows[:, 0, 0, 0].sign(), -windows[:, 0, 0, 0].sign()], dim=1)
    luck = torch.randn(400, 2, generator=torch.Generator().manual_seed(2))
    predicted = smoothed(shared + luck, windows, mask)
    assert torch.corrcoef(torch.stack([predicted[:, 0], shared[:, 0]]))[0, 1] > 0.8
    assert torch.corrcoef(torch.stack([predicted[:, 0], luck[:, 0]]))[0, 1].abs() < 0.15


def test_groups_are_the_clusters():
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(90) % 3
    effects = torch.eye(3)[kinds] + 0.05 * torch.randn(90, 3, generator=generator)
    groups = groups_of(effects, 3, seed=0)
    assert len({(kind, group) for kind, group in zip(kinds.tolist(), groups.tolist(), strict=True)}) == 3
    assert torch.equal(groups, groups_of(effects, 3, seed=0))
    assert groups_of(torch.zeros(4, 3), 20, seed=0).unique().numel() == 1, "fewer groups where there are fewer kinds"
