"""Rewards against whole passes one at a time, neighbours, groups, their paths, and the routers that learn them."""

import dataclasses
import itertools

import pytest
import torch

from drllm import tasks
from drllm.ablations import MINIATURE_DATA
from drllm.effects import (
    MARGIN_SCALE,
    Answered,
    EffectRound,
    GroupPath,
    at_price,
    groups_of,
    grow,
    imitate,
    main,
    measure,
    read_along,
    refine,
    smoothed,
)
from drllm.look import load_routed_checkpoint
from drllm.rollout import Prompt
from drllm.router_checkpoint import join_routers
from drllm.router_modules import StackedRouters
from drllm.tasks import Question
from train_models import retrofit
from train_models.paths import is_allowed, path_to_layer_indices

NUM_BLOCKS = 6


def questions(count: int) -> list[Answered]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        ids = tuple(torch.randint(2, 61, (4 + 3 * number,), generator=generator).tolist())
        answer = tuple(torch.randint(2, 61, (1 + number % 3,), generator=generator).tolist())
        question = Question("dart-1", f"q{number}", "", (), (), "0")
        made.append(Answered(Prompt(question, "", ids, 5), answer))
    return made


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_rewards_equal_whole_passes(family, stock_checkpoint):
    routed = retrofit(stock_checkpoint(family), dtype=torch.float32).eval()
    asked = questions(5)
    paths = [(1,) * 6, (0, 1, 2, 1, 1, 1), (2, 0, 0, 1, 1, 2), (1, 1, 1, 1, 0, 0), (0, 0, 0, 0, 1, 0)]
    measured = measure(routed, asked, paths, batch_size=3, actions=(0, 1, 2))
    for number, (each, path) in enumerate(zip(asked, paths, strict=True)):
        ids = torch.tensor([[*each.prompt.input_ids, *each.answer_ids]])
        start = len(each.prompt.input_ids)
        for block in range(NUM_BLOCKS):
            for action in range(3):
                changed = (*path[:block], action, *path[block + 1 :])
                if not sum(changed):
                    assert measured.rewards[number, block, action].isnan()
                    continue
                with torch.no_grad():
                    logits = routed(ids[:, :-1], layer_indices=path_to_layer_indices(changed)).logits[0, start - 1 :]
                gold = ids[0, start:, None]
                rivals = logits.scatter(1, gold, -torch.inf).amax(1)
                expected = ((logits.gather(1, gold)[:, 0] - rivals).min() / MARGIN_SCALE).sigmoid()
                torch.testing.assert_close(measured.rewards[number, block, action], expected, rtol=1e-3, atol=1e-7)
        with torch.no_grad():
            alone = routed(ids[:, :start], layer_indices=path_to_layer_indices(path), output_router_inputs=True)
        torch.testing.assert_close(measured.windows[number], alone.router_inputs[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(measured.window_mask[number], alone.window_mask[0])


def test_actions_that_were_not_asked_are_unknown(stock_checkpoint):
    routed = retrofit(stock_checkpoint("llama"), dtype=torch.float32).eval()
    measured = measure(routed, questions(2), [(1,) * 6, (2, 1, 1, 0, 1, 1)], actions=(0,))
    known = measured.rewards.isfinite()
    assert known[:, :, 0].all()
    assert known[0, :, 1].all()
    assert not known[0, :, 2].any()
    assert known[1, :, 2].tolist() == [True] + [False] * 5, "the path's own actions are known"
    torch.testing.assert_close(measured.own(), measured.rewards[torch.arange(2), 0, torch.tensor([1, 2])])


def toy_windows(count: int, num_blocks: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows [N, L, 4, 8] whose first feature is one number a question, and their mask [N, 4]."""
    windows = torch.randn(count, num_blocks, 4, 8, generator=torch.Generator().manual_seed(1))
    windows[..., 0] = 3 * windows[:, :1, :1, 0]
    return windows, torch.ones(count, 4, dtype=torch.bool)


def test_neighbours_leave_out_the_question_itself():
    windows, mask = toy_windows(60)
    effects = torch.randn(60, 2, generator=torch.Generator().manual_seed(2))
    together = smoothed(effects, windows, mask)
    for place in (0, 7):
        changed = effects.clone()
        changed[place] += 5.0
        # The question's own effect acts through the mean over all questions alone.
        moved = (smoothed(changed, windows, mask) - together)[place]
        assert moved.abs().max() < 5.0 / 60 + 0.02


def test_neighbours_see_what_is_shared_and_not_luck():
    windows, mask = toy_windows(400)
    shared = torch.stack([windows[:, 0, 0, 0].sign(), -windows[:, 0, 0, 0].sign()], dim=1)
    luck = torch.randn(400, 2, generator=torch.Generator().manual_seed(2))
    found = smoothed(shared + luck, windows, mask)
    assert torch.corrcoef(torch.stack([found[:, 0], shared[:, 0]]))[0, 1] > 0.8
    assert torch.corrcoef(torch.stack([found[:, 0], luck[:, 0]]))[0, 1].abs() < 0.15


def test_groups_are_the_clusters():
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(90) % 3
    effects = torch.eye(3)[kinds] + 0.05 * torch.randn(90, 3, generator=generator)
    groups = groups_of(effects, 3, seed=0)
    assert len({(kind, group) for kind, group in zip(kinds.tolist(), groups.tolist(), strict=True)}) == 3
    assert torch.equal(groups, groups_of(effects, 3, seed=0))
    assert groups_of(torch.zeros(4, 3), 20, seed=0).unique().numel() == 1, "fewer groups where there are fewer kinds"


def test_groups_grow_the_skips_that_cost_least(stock_checkpoint):
    routed = retrofit(stock_checkpoint("llama"), dtype=torch.float32).eval()
    asked = questions(6)
    groups = torch.tensor([0, 1, 0, 1, 0, 1])
    first = measure(routed, asked, [(1,) * NUM_BLOCKS] * 6)
    chains = grow(routed, asked, groups, first, most_skips=3)
    for group, chain in enumerate(chains):
        members = [each for each, number in zip(asked, groups.tolist(), strict=True) if number == group]
        assert [each.path.count(0) for each in chain] == [0, 1, 2, 3]
        for before, after in itertools.pairwise(chain):
            assert is_allowed(after.path)
            rewards = {}
            for block in range(NUM_BLOCKS):
                other = (*before.path[:block], 0, *before.path[block + 1 :])
                if before.path[block] and is_allowed(other):
                    rewards[other] = float(measure(routed, members, [other] * 3, actions=()).own().mean())
            assert after.path == max(rewards, key=rewards.get)
            assert after.reward == pytest.approx(rewards[after.path], abs=1e-5)


def test_a_chain_ends_where_no_skip_is_allowed(stock_checkpoint):
    routed = retrofit(stock_checkpoint("llama", num_hidden_layers=3), dtype=torch.float32).eval()
    asked = questions(2)
    first = measure(routed, asked, [(1, 1, 1)] * 2)
    (chain,) = grow(routed, asked, torch.zeros(2, dtype=torch.long), first, most_skips=9)
    assert 2 <= len(chain) <= 3, "at most two of three blocks are skipped"


def test_the_price_says_how_far():
    chain = [GroupPath((1, 1, 1), 0.8), GroupPath((1, 0, 1), 0.79), GroupPath((0, 0, 1), 0.5)]
    other = [GroupPath((1, 1, 1), 0.8), GroupPath((1, 0, 1), 0.6)]
    groups = torch.tensor([0, 1, 0])
    assert at_price([chain, other], groups, 0.0) == [(1, 1, 1)] * 3
    assert at_price([chain, other], groups, 0.02) == [(1, 0, 1), (1, 1, 1), (1, 0, 1)]
    assert at_price([chain, other], groups, 0.5) == [(0, 0, 1), (1, 0, 1), (0, 0, 1)]


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
        imitate(routers, windows, mask, labels, epochs=20, learning_rate=1e-2, seed=seed)
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
    imitate(routers, windows, mask, paths, epochs=2, learning_rate=1e-2, seed=0)
    assert (routers(windows, mask)["logits"].argmax(-1) == 0).all()
    refine(routers, EffectRound(paths, rewards, windows, mask), price=0.02, epochs=30, learning_rate=1e-2, seed=0)
    decided = routers(windows, mask)["logits"].argmax(-1)
    assert (decided[:, 0] == torch.where(helps, 0, 1)).float().mean() > 0.9
    assert (decided[:, 1] == 0).all(), "one point does not pay a price of two"


def test_windows_are_those_of_a_question_alone(stock_checkpoint):
    routed = retrofit(stock_checkpoint("llama"), dtype=torch.float32).eval()
    asked, paths = questions(3), [(1,) * 6, (0, 1, 2, 1, 1, 1), (1, 1, 0, 0, 1, 1)]
    windows, mask = read_along(routed, asked, paths, batch_size=2)
    for number, (each, path) in enumerate(zip(asked, paths, strict=True)):
        ids = torch.tensor([each.prompt.input_ids])
        with torch.no_grad():
            alone = routed(ids, layer_indices=path_to_layer_indices(path), output_router_inputs=True)
        torch.testing.assert_close(windows[number], alone.router_inputs[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(mask[number], alone.window_mask[0])


def test_answers_have_the_form_that_the_prompt_asks_for():
    class Tokenizer:
        eos_token_id = 9

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [text]}

    letter = Question("arc_easy", "a", "?", ("x", "y"), ("A", "B"), "B")
    number = dataclasses.replace(letter, set="dart-3", choices=(), labels=(), answer="42")
    texts = [Answered.of(Prompt(each, "", (1,), 5), Tokenizer()).answer_ids for each in (letter, number)]
    assert texts == [(" B", 9), (" \\boxed{42}", 9)]


def test_one_command_from_questions_to_a_checkpoint(tmp_path):
    command = f"--data_dir {MINIATURE_DATA} --dataset arc_easy,dart-5 --train_questions 6 --groups 2 --most_skips 1"
    main([*command.split(), "--price", "2", "--output_dir", str(tmp_path)])
    model, tokenizer = load_routed_checkpoint(str(tmp_path))
    assert model.config.trained_num_windows == 8
    text = tasks.render_prompt(tasks.load_questions("arc_easy", "train", MINIATURE_DATA, 1)[0])
    with torch.no_grad():
        paths = model(**tokenizer(text, return_tensors="pt")).paths
    assert paths.eq(0).sum() == 1, "a price above every reward skips what it can"
    assert join_routers(tmp_path / "routers").config.base_model_fingerprint == model.config.base_model_fingerprint
