"""Static rivals on a toy whose right answer is known, and random paths by their rates."""

import itertools
from collections import Counter

import pytest
import torch

from drllm.group_paths.margin_rewards import MarginRewards
from drllm.rivals import BlockInfluence, EarlyExit, GreedySkips, random_paths
from tests.search_toys import answered_questions

NUM_BLOCKS = 6


@pytest.mark.parametrize("rival", [EarlyExit(), BlockInfluence(), GreedySkips()], ids=lambda rival: rival.name)
def test_element_k_skips_k_blocks(rival, routed):
    paths = rival.fit(routed, answered_questions(4), 3)
    assert [path.count(0) for path in paths] == [0, 1, 2, 3]
    assert paths[0] == (1,) * NUM_BLOCKS
    assert all(set(path) <= {0, 1} and len(path) == NUM_BLOCKS for path in paths)


def test_early_exit_skips_the_last_blocks(routed):
    assert EarlyExit().fit(routed, [], 2) == [(1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 0), (1, 1, 1, 1, 0, 0)]


def test_block_influence_skips_blocks_that_return_their_input(routed_with_idle_blocks):
    paths = BlockInfluence(batch_size=2).fit(routed_with_idle_blocks, answered_questions(5), 2)
    assert paths[2] == (1, 1, 0, 1, 0, 1)


def test_similarities_equal_those_of_questions_alone(routed):
    questions = answered_questions(5)
    states = []
    hooks = [
        layer.register_forward_hook(lambda module, arguments, output: states.append((arguments[0], output)))
        for layer in routed.model.layers
    ]
    for question in questions:
        with torch.no_grad():
            routed(torch.tensor([question.prompt.input_ids]), layer_indices=list(range(NUM_BLOCKS)))
    for hook in hooks:
        hook.remove()
    sums = torch.stack([torch.cosine_similarity(before, after, dim=-1).sum() for before, after in states])
    expected = sums.view(len(questions), NUM_BLOCKS).sum(0)
    torch.testing.assert_close(BlockInfluence(batch_size=2).similarities(routed, questions), expected)
    # About so many questions are used, evenly spaced.
    few = BlockInfluence(calibration_questions=2).similarities(routed, questions)
    every_second = BlockInfluence().similarities(routed, questions[::2])
    torch.testing.assert_close(few, every_second)


def test_greedy_skips_cost_the_questions_least(routed):
    questions = answered_questions(4)
    paths = GreedySkips(batch_size=3).fit(routed, questions, 3)
    for before, after in itertools.pairwise(paths):
        means = {}
        for block in range(NUM_BLOCKS):
            if before[block]:
                path = (*before[:block], 0, *before[block + 1 :])
                means[path] = float(MarginRewards(routed, questions).around([path] * 4, actions=()).own().mean())
        assert after == max(means, key=means.get)


def test_random_paths_keep_the_rates_of_each_block():
    paths = [(1, 0, 2), (1, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 2)]
    shuffled = random_paths(paths, seed=0)
    for drawn, decided in zip(zip(*shuffled, strict=True), zip(*paths, strict=True), strict=True):
        assert Counter(drawn) == Counter(decided)
    assert random_paths(paths, seed=0) == shuffled
    assert any(random_paths(paths, seed) != shuffled for seed in range(1, 5))
