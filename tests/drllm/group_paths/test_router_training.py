"""Routers that learn labels, and a round on their own decisions."""

import pytest
import torch

from drllm.group_paths.margin_rewards import RewardRound
from drllm.group_paths.router_training import fit_domains, imitate, knob_that_keeps, refine
from drllm.training.router_modules import StackedRouters
from tests.search_toys import toy_windows
from train_models import retrofit
from train_models.routing import RouterBlock, route


def toy_routers(stock_checkpoint, seed: int = 0) -> StackedRouters:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    routed = retrofit(stock_checkpoint("llama", **sizes))
    routed.model.init_routers(seed)
    return StackedRouters(routed.model.routers)


def test_routers_learn_the_labels(stock_checkpoint):
    windows, mask = toy_windows(400)
    positive = windows[:, 0, 0, 0] > 0
    labels = [(0, 1) if is_positive else (1, 1) for is_positive in positive.tolist()]
    weights = []
    for seed in (0, 0, 1):
        routers = toy_routers(stock_checkpoint)
        imitate(routers, RewardRound(labels, torch.empty(0), windows, mask), epochs=20, learning_rate=1e-2, seed=seed)
        weights.append(routers.weights[0].detach().clone())
        decided = routers(windows, mask)["logits"].argmax(-1)
        assert (decided == torch.tensor(labels)).all(1).float().mean() > 0.95
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_round_on_own_decisions_takes_back_what_does_not_pay(stock_checkpoint):
    windows, mask = toy_windows(400)
    helps = windows[:, 0, 0, 0] > 0
    paths = [(0, 0)] * 400  # routers that skip everything
    rewards = torch.full((400, 2, 3), float("nan"))
    rewards[:, :, 0] = 0.5
    rewards[:, 0, 1] = torch.where(helps, 0.3, 0.7)
    rewards[:, 1, 1] = 0.51
    routers = toy_routers(stock_checkpoint)
    imitate(routers, RewardRound(paths, torch.empty(0), windows, mask), epochs=2, learning_rate=1e-2, seed=0)
    assert (routers(windows, mask)["logits"].argmax(-1) == 0).all()
    refine(routers, RewardRound(paths, rewards, windows, mask), price=0.02, epochs=30, learning_rate=1e-2, seed=0)
    decided = routers(windows, mask)["logits"].argmax(-1)
    assert (decided[:, 0] == torch.where(helps, 0, 1)).float().mean() > 0.9
    assert (decided[:, 1] == 0).all(), "one point does not pay a price of two"


def test_only_its_members_train_the_routers(stock_checkpoint):
    windows, mask = toy_windows(40)
    weights = []
    for others in ((0, 1), (2, 0)):  # labels of questions that are no members
        routers = toy_routers(stock_checkpoint)
        along = RewardRound([(0, 1)] * 20 + [others] * 20, torch.empty(0), windows, mask)
        imitate(routers, along, epochs=2, learning_rate=1e-2, seed=0, members=torch.arange(20))
        weights.append(routers.weights[0].detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5])
def test_at_the_knob_a_share_of_the_edits_is_kept_and_unsure_routers_execute(stock_checkpoint, share):
    windows, mask = toy_windows(400)
    routers = toy_routers(stock_checkpoint)
    labels = [(0, 1) if is_positive else (1, 1) for is_positive in (windows[:, 0, 0, 0] > 0).tolist()]
    along = RewardRound(labels, torch.empty(0), windows, mask)
    imitate(routers, along, epochs=3, learning_rate=1e-3, seed=0, members=torch.arange(200))
    members = torch.arange(200, 400)
    logits = routers(windows, mask)["logits"][members]
    is_edited = torch.tensor(labels)[members][:, 0] == 0
    pure = (route(logits)[is_edited, 0] == 0).float().mean().item()
    knob = knob_that_keeps(routers, along, members, share)
    kept = (route(logits, knob)[is_edited, 0] == 0).float().mean().item()
    assert kept == pytest.approx(min(share, pure), abs=0.02)
    if share < pure:
        assert knob > -0.5
        assert (route(logits, knob + 0.02)[is_edited, 0] == 0).float().mean() < kept


def test_without_edits_the_knob_is_that_of_the_pure_router(stock_checkpoint):
    windows, mask = toy_windows(8)
    along = RewardRound([(1, 1)] * 8, torch.empty(0), windows, mask)
    assert knob_that_keeps(toy_routers(stock_checkpoint), along, torch.arange(8), 0.9) == -0.5


def correlated_windows(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Windows [count, 2, 1, 8] whose first two dimensions vary together; `shift` moves them apart."""
    windows = 0.1 * torch.randn(count, 2, 1, 8, generator=torch.Generator().manual_seed(seed))
    common = torch.randn(count, 2, 1, generator=torch.Generator().manual_seed(seed + 1))
    windows[..., 0] += common + shift
    windows[..., 1] += common - shift
    return windows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_domain_of_a_router_is_the_prompts_that_deviate_at_its_block(dtype):
    windows, mask = correlated_windows(600, 0).to(dtype), torch.ones(600, 1, dtype=torch.bool)
    along = RewardRound([(0, 1)] * 600, torch.empty(0), windows, mask)
    routers = [RouterBlock(8, width=4, domain_rank=7).to(dtype) for _ in range(2)]
    fit_domains(routers, along, torch.arange(300), torch.arange(300, 600), 0.9)
    first, second = routers

    def inside(windows: torch.Tensor) -> float:
        return (first.distance(windows[:, 0], mask[: len(windows)]) <= first.radius.float()).float().mean().item()

    assert inside(windows[300:]) == pytest.approx(0.9, abs=0.02)
    assert inside(correlated_windows(200, 5)) == pytest.approx(0.9, abs=0.06)
    # half a standard deviation away in each dimension, but in a direction in which the domain does not vary
    assert inside(correlated_windows(200, 5, shift=0.5)) < 0.05
    assert not (second.distance(windows[:, 1], mask) <= second.radius).any(), "no label deviates at the second block"
    assert (second(windows[:, 1], mask).argmax(-1) == 1).all()


def test_a_domain_of_full_rank_measures_the_mahalanobis_distance():
    windows, mask = correlated_windows(400, 0), torch.ones(400, 1, dtype=torch.bool)
    (router,) = routers = [RouterBlock(8, width=4, domain_rank=20)]
    fit_domains(
        routers, RewardRound([(0,)] * 400, torch.empty(0), windows, mask), torch.arange(400), torch.arange(0), 1
    )
    centred = windows[:, 0, 0] - windows[:, 0, 0].mean(0)
    expected = torch.einsum("ni,ij,nj->n", centred, torch.linalg.inv(torch.cov(centred.T)), centred).sqrt()
    ratio = router.distance(windows[:, 0], mask) / expected
    torch.testing.assert_close(ratio, ratio[:1].expand(400), rtol=1e-3, atol=0)
    assert (router.distance(windows[:, 0], mask) <= router.radius).all(), "every prompt that was asked about"
