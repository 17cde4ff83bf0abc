"""Static paths on toys whose right answer is known."""

from types import SimpleNamespace

import pytest
import torch

from drllm.provenance import fingerprint
from extensions.baselines.interface import fit_once
from extensions.baselines.static_paths import BlockInfluence, EarlyExit, GreedySkips, path_of
from tests.baseline_toys import toy_bench
from tests.search_toys import answered_questions

NUM_BLOCKS = 6


@pytest.mark.parametrize("baseline", [EarlyExit(), BlockInfluence()], ids=lambda baseline: baseline.name)
def test_the_budget_is_skipped(baseline, routed):
    bench = toy_bench(routed, answered_questions(4))
    for skips in range(4):
        path = baseline.path(bench, skips)
        assert path.count(0) == skips
        assert set(path) <= {0, 1}
        assert len(path) == NUM_BLOCKS


def test_early_exit_skips_the_last_blocks(routed, tmp_path):
    before = fingerprint(routed)
    assert path_of(fit_once(EarlyExit(), toy_bench(routed, [], tmp_path), 2, 0)[0]) == (1, 1, 1, 1, 0, 0)
    assert fingerprint(routed) == before


def test_block_influence_skips_blocks_that_return_their_input_and_is_fitted_once(routed_with_idle_blocks, tmp_path):
    bench = toy_bench(routed_with_idle_blocks, answered_questions(5), tmp_path)
    fitted, cost = fit_once(BlockInfluence(), bench, 2, 0)
    assert path_of(fitted) == (1, 1, 0, 1, 0, 1)
    assert cost.parameters == 0
    # From the folder, with the seconds of the first call.
    assert fit_once(BlockInfluence(), bench, 2, 0)[1] == cost
    assert len(list((tmp_path / "fitted").iterdir())) == 1
    fit_once(BlockInfluence(), bench, 1, 0)
    assert len(list((tmp_path / "fitted").iterdir())) == 2, "another budget is another fit"


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
    torch.testing.assert_close(BlockInfluence().similarities(toy_bench(routed, questions)), expected)
    # About so many questions are used, evenly spaced.
    few = BlockInfluence(calibration_questions=2).similarities(toy_bench(routed, questions))
    every_second = BlockInfluence().similarities(toy_bench(routed, questions[::2]))
    torch.testing.assert_close(few, every_second)


def test_greedy_skips_cost_the_reward_least():
    """Each block is worth a reward of its own; block 2 is worth less than nothing, and skipping 4 costs without it."""
    worth = (9, 3, -1, 5, 2, 4)

    def rewards(paths, title):
        return {path: [sum(w * visits for w, visits in zip(worth, path, strict=True))] * 3 for path in paths}

    bench = SimpleNamespace(num_blocks=6, training_rewards=rewards)
    assert [GreedySkips().path(bench, skips) for skips in range(3)] == [
        (1, 1, 1, 1, 1, 1),
        (1, 1, 0, 1, 1, 1),
        (1, 1, 0, 1, 0, 1),
    ]
