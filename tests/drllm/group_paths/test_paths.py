"""The paths of groups: how they grow, and what a price chooses."""

import itertools

import pytest
import torch

from drllm.group_paths.margin_rewards import MarginRewards
from drllm.group_paths.paths import GroupPath, at_price, grow
from tests.search_toys import answered_questions as questions
from train_models import retrofit
from train_models.paths import is_allowed

NUM_BLOCKS = 6


def test_groups_grow_the_skips_that_cost_least(stock_checkpoint):
    routed = retrofit(stock_checkpoint("llama"), dtype=torch.float32).eval()
    gold = questions(6)
    groups = torch.tensor([0, 1, 0, 1, 0, 1])
    rewards = MarginRewards(routed, gold)
    first = rewards.around([(1,) * NUM_BLOCKS] * 6)
    chains = grow(lambda paths, _skips: rewards.around(paths), groups, first, most_skips=3)
    for group, chain in enumerate(chains):
        members = [answered for answered, number in zip(gold, groups.tolist(), strict=True) if number == group]
        assert [each.path.count(0) for each in chain] == [0, 1, 2, 3]
        for before, after in itertools.pairwise(chain):
            assert is_allowed(after.path)
            means = {}
            for block in range(NUM_BLOCKS):
                other = (*before.path[:block], 0, *before.path[block + 1 :])
                if before.path[block] and is_allowed(other):
                    along = MarginRewards(routed, members).around([other] * 3, actions=())
                    means[other] = float(along.own().mean())
            assert after.path == max(means, key=means.get)
            assert after.reward == pytest.approx(means[after.path], abs=1e-5)


def test_a_chain_ends_where_no_skip_is_allowed(stock_checkpoint):
    routed = retrofit(stock_checkpoint("llama", num_hidden_layers=3), dtype=torch.float32).eval()
    gold = questions(2)
    rewards = MarginRewards(routed, gold)
    first = rewards.around([(1, 1, 1)] * 2)
    together = torch.zeros(2, dtype=torch.long)
    (chain,) = grow(lambda paths, _skips: rewards.around(paths), together, first, most_skips=9)
    assert 2 <= len(chain) <= 3, "at most two of three blocks are skipped"


def test_the_price_says_how_far():
    chain = [GroupPath((1, 1, 1), 0.8), GroupPath((1, 0, 1), 0.79), GroupPath((0, 0, 1), 0.5)]
    other = [GroupPath((1, 1, 1), 0.8), GroupPath((1, 0, 1), 0.6)]
    groups = torch.tensor([0, 1, 0])
    assert at_price([chain, other], groups, 0.0) == [(1, 1, 1)] * 3
    assert at_price([chain, other], groups, 0.02) == [(1, 0, 1), (1, 1, 1), (1, 0, 1)]
    assert at_price([chain, other], groups, 0.5) == [(0, 0, 1), (1, 0, 1), (0, 0, 1)]
