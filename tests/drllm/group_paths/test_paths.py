"""Neighbours, groups, their paths, and the routers that learn them."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drllm.checkpoints import join_routers, load_routed_checkpoint, load_tokenizer
from drllm.group_paths.margin_rewards import EffectRound, measure
from drllm.group_paths.paths import GroupPath, at_price, groups_of, grow, imitate, main, refine, smoothed
from drllm.questions.prompts import render_prompt
from drllm.questions.sets import load_questions
from drllm.training.router_modules import StackedRouters
from experiments.ablations import MINIATURE_DATA
from tests.search_toys import answered_questions as questions
from train_models import retrofit
from train_models.paths import is_allowed

NUM_BLOCKS = 6
ROOT = Path(__file__).resolve().parents[3]


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
    chains = grow(lambda paths, _skips: measure(routed, asked, paths), groups, first, most_skips=3)
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
    together = torch.zeros(2, dtype=torch.long)
    (chain,) = grow(lambda paths, _skips: measure(routed, asked, paths), together, first, most_skips=9)
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
        imitate(routers, EffectRound(labels, torch.empty(0), windows, mask), epochs=20, learning_rate=1e-2, seed=seed)
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
    imitate(routers, EffectRound(paths, torch.empty(0), windows, mask), epochs=2, learning_rate=1e-2, seed=0)
    assert (routers(windows, mask)["logits"].argmax(-1) == 0).all()
    refine(routers, EffectRound(paths, rewards, windows, mask), price=0.02, epochs=30, learning_rate=1e-2, seed=0)
    decided = routers(windows, mask)["logits"].argmax(-1)
    assert (decided[:, 0] == torch.where(helps, 0, 1)).float().mean() > 0.9
    assert (decided[:, 1] == 0).all(), "one point does not pay a price of two"


def test_one_command_from_questions_to_a_checkpoint(tmp_path):
    command = f"--data_dir {MINIATURE_DATA} --dataset arc_easy,dart-5 --train_questions 6 --groups 2 --most_skips 1"
    main([*command.split(), "--price", "2", "--output_dir", str(tmp_path)])
    model, tokenizer = load_routed_checkpoint(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert model.config.trained_num_windows == 8
    assert json.loads((tmp_path / "labels_manifest.json").read_text())["chat_template"] is False
    text = render_prompt(load_questions("arc_easy", "train", MINIATURE_DATA, 1)[0])
    with torch.no_grad():
        paths = model(**tokenizer(text, return_tensors="pt")).paths
    assert paths.eq(0).sum() == 1, "a price above every reward skips what it can"
    assert join_routers(tmp_path / "routers").config.base_model_fingerprint == model.config.base_model_fingerprint


@pytest.mark.slow
def test_two_processes_make_the_same_checkpoint_and_a_stopped_one_is_continued(tmp_path):
    common = f"-m drllm.effects --data_dir {MINIATURE_DATA} --dataset arc_easy,dart-5 --train_questions 300 --groups 4"
    command = [*common.split(), "--most_skips", "1", "--price", "0.01", "--output_dir"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    alone = subprocess.Popen([sys.executable, *command, tmp_path / "alone"], cwd=ROOT, env=environment)
    while len(list(tmp_path.glob("alone-measured/*/*.safetensors"))) < 3:
        assert alone.poll() is None
        time.sleep(0.05)
    alone.kill()
    alone.wait()
    kept = {part: part.stat().st_mtime_ns for part in tmp_path.glob("alone-measured/*/*.safetensors")}
    subprocess.run([sys.executable, *command, tmp_path / "alone"], cwd=ROOT, env=environment, check=True)
    assert all(part.stat().st_mtime_ns == written for part, written in kept.items())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631"]
    subprocess.run([*torchrun, *command, tmp_path / "two"], cwd=ROOT, env=environment, check=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name])
