"""Paths of groups under a log-likelihood reward: known effects are recovered, and the program runs end to end."""

import json
import math

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from drllm.group_paths.likelihood_paths import Growth, LikelihoodPaths, promising_edits
from drllm.group_paths.likelihood_rewards import LikelihoodRewards
from drllm.group_paths.margin_rewards import RewardRound
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.questions.sets import Question, load_questions
from drllm.rollouts.scores import ScoreStore
from experiments import group_paths
from tests import search_toys
from tests.conftest import STOCK
from train_models import retrofit
from train_models.paths import default_path

NUM_BLOCKS = 6


class KnownRewards:
    """Two kinds of questions: skipping block 2 helps the first and hurts the second; block 4 the other way round.

    Repeating block 5 helps the second kind. Everything else costs a lot.
    """

    def __init__(self, count: int) -> None:
        self.state = PartialState()
        self.kinds = [number % 2 for number in range(count)]
        self.prompts = [
            LikelihoodPrompt(Question("arc_easy", f"q{n}", "", (), (), ""), "", (1, 2), (), (), (), 0)
            for n in range(count)
        ]

        class Routed:
            class config:
                num_hidden_layers = NUM_BLOCKS

        self.routed = Routed
        self.measured = []
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(count, generator=generator) * 0.01

    def reward(self, kind: int, path) -> float:
        gains = [{(2, 0): 0.05, (4, 0): -0.1}, {(4, 0): 0.05, (2, 0): -0.1, (5, 2): 0.03}][kind]
        return 0.5 + sum(gains.get((block, action), -0.2) for block, action in enumerate(path) if action != 1)

    def around(self, paths, edits, with_windows=True, title=""):
        self.measured.append(int(edits.sum()))
        rewards = torch.full((len(paths), NUM_BLOCKS, 3), math.nan)
        for row, (path, kind) in enumerate(zip(paths, self.kinds, strict=True)):
            for block in range(NUM_BLOCKS):
                rewards[row, block, path[block]] = self.reward(kind, path) + self.noise[row]
                for action in edits[row, block].nonzero().flatten().tolist():
                    other = (*path[:block], action, *path[block + 1 :])
                    rewards[row, block, action] = self.reward(kind, other) + self.noise[row]
        kinds = torch.tensor(self.kinds, dtype=torch.float32)
        windows = kinds[:, None, None, None].expand(-1, NUM_BLOCKS, 1, 4) + 0.01 * self.noise[:, None, None, None]
        return RewardRound(list(paths), rewards, windows.clone(), torch.ones(len(paths), 1, dtype=torch.bool))


def test_each_kind_gets_its_own_path():
    rewards = KnownRewards(40)
    paths = LikelihoodPaths(rewards, Growth(groups=2, pilot=20, keep=3, candidates=3, max_edits=3, price=0.001))
    assert sorted(map(tuple, paths.edits.nonzero().tolist())) == [(2, 0), (4, 0), (5, 2)]
    labels = paths.labels()
    assert {label for label, kind in zip(labels, rewards.kinds, strict=True) if kind == 0} == {(1, 1, 0, 1, 1, 1)}
    assert {label for label, kind in zip(labels, rewards.kinds, strict=True) if kind == 1} == {(1, 1, 1, 1, 0, 2)}
    # a block application that costs more than a repeat gains
    assert set(paths.labels(price=0.04)) == {(1, 1, 0, 1, 1, 1), (1, 1, 1, 1, 0, 1)}


def test_dropped_edits_are_not_measured_again():
    rewards = KnownRewards(40)
    LikelihoodPaths(rewards, Growth(groups=2, pilot=5, keep=3, candidates=1, max_edits=2))
    pilot, first, *growth = rewards.measured
    assert pilot == 5 * 2 * NUM_BLOCKS  # one set
    assert first == 40 * 3
    assert growth == [40 * 2, 0]  # one candidate and the edit just made; nothing around the last path


def test_a_favourite_of_one_set_is_kept():
    effects = torch.full((200, 3, 3), -0.1)
    effects[100:, 0, 0] = 0.2  # helps the second set only
    effects[:, 1, 2] = 0.0
    kept = promising_edits(effects, ["a"] * 100 + ["b"] * 100, keep=2)
    assert kept.nonzero().tolist() == [[0, 0], [1, 2]]


@pytest.mark.parametrize("name", ["groups", "pilot", "keep", "candidates"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        Growth(**{name: 0})


@pytest.fixture(scope="module")
def toy(tmp_path_factory, stock_checkpoint):
    """(folder of a checkpoint, folder of questions)."""
    folder = tmp_path_factory.mktemp("likelihood_paths")

    def stock_model(family, changes):
        return STOCK[family][1].from_pretrained(stock_checkpoint(family, **changes), dtype=torch.float32)

    search_toys.make_model(folder / "model", stock_model)
    return folder / "model", search_toys.make_data(folder / "data", 16, seed=5)


def test_rewards_around_paths_are_those_of_the_scores(toy, tmp_path):
    folder, data = toy
    _, tokenizer = search_toys.load(folder)
    routed = retrofit(str(folder), dtype=torch.float32).eval()
    prompts = [LikelihoodPrompt.of(question, tokenizer) for question in load_questions("arc_easy", "train", data)]
    rewards = LikelihoodRewards(routed, prompts, ScoreStore(tmp_path, {}), PartialState(), batch_size=4, scale=2.0)
    paths = [default_path(NUM_BLOCKS) if n % 2 else (1, 0, 0, 1, 1, 2) for n in range(len(prompts))]
    edits = torch.zeros(len(prompts), NUM_BLOCKS, 3, dtype=torch.bool)
    edits[:, 3, 0] = True  # a third skip in a row for half of the questions, which the search may not use
    edits[:, 4, 2] = True
    found = rewards.around(paths, edits)
    for row, (prompt, path) in enumerate(zip(prompts, paths, strict=True)):
        margin = prompt.margin(rewards._scores.get(prompt.question.id, path), False)
        assert found.own()[row] == pytest.approx(1 / (1 + math.exp(-margin / 2)), abs=1e-6)
        assert rewards.is_right(prompt, path) == (found.own()[row] > 0.5)
        assert bool(found.rewards[row, 3, 0].isnan()) == (row % 2 == 0)
        assert found.rewards[row, 4, 2] == pytest.approx(rewards.reward(prompt, (*path[:4], 2, path[5])))
    # the routers read the context alone, and along the path
    alone = routed.model(
        input_ids=torch.tensor([prompts[0].input_ids]), layer_indices=[0, 3, 4, 5, 5], output_router_inputs=True
    )
    torch.testing.assert_close(found.windows[0], alone.router_inputs[0])


def test_the_program_makes_a_checkpoint_and_resumes(toy, tmp_path, monkeypatch):
    folder, data = toy
    arguments = f"--reward likelihood --model {folder} --data_dir {data} --dataset arc --train_questions 12 --groups 2"
    arguments += " --pilot 4 --keep 3 --candidates 2 --most_skips 2 --price 0.05 --batch_size 4"
    assert group_paths.main([*arguments.split(), "--output_dir", str(tmp_path / "groups")]) == 0
    manifest = json.loads((tmp_path / "groups" / "labels_manifest.json").read_text())
    assert manifest["reward"] == "likelihood"
    assert manifest["chat_template"] is False
    lines = (tmp_path / "groups-measured" / "00000.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "again-measured").mkdir()
    (tmp_path / "again-measured" / "00000.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:7])
    assert group_paths.main([*arguments.split(), "--output_dir", str(tmp_path / "again")]) == 0
    assert sorted((tmp_path / "again-measured" / "00000.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("groups", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_price_decides_which_edits_stay():
    rewards = KnownRewards(40)
    # repeating block 5 gains 0.03 for half of the questions, which a block application at 0.25 outweighs
    paths = LikelihoodPaths(rewards, Growth(groups=2, pilot=20, keep=6, max_edits=1, price=0.25))
    assert not paths.edits[:, 2].any()
    assert set(paths.labels()) == {(1, 1, 0, 1, 1, 1), (1, 1, 1, 1, 0, 1)}
