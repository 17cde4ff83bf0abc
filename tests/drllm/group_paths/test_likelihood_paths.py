"""Paths of groups under a log-likelihood reward: known effects are recovered, and the program runs end to end."""

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from drllm.checkpoints import join_routers, load_tokenizer
from drllm.errors import UserError
from drllm.group_paths.likelihood_paths import Growth, LikelihoodPaths, groups_by_set, groups_by_states
from drllm.group_paths.likelihood_rewards import LikelihoodRewards
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.questions.sets import Question, collections_of, load_questions
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
        self.scored = set()
        self.effect_noise = 0.0
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(count, generator=generator) * 0.01

    def value(self, kind: int, path) -> float:
        gains = [{(2, 0): 0.05, (4, 0): -0.1}, {(4, 0): 0.05, (2, 0): -0.1, (5, 2): 0.03}][kind]
        return 0.5 + sum(gains.get((block, action), -0.2) for block, action in enumerate(path) if action != 1)

    def score(self, work, title):
        for index, paths in enumerate(work):
            self.scored |= {(index, path) for path in paths}

    def reward(self, prompt, path):
        index = self.prompts.index(prompt)
        assert (index, path) in self.scored
        generator = torch.Generator().manual_seed(hash((index, path)) % 2**32)
        luck = self.effect_noise * float(torch.randn(1, generator=generator))
        return self.value(self.kinds[index], path) + float(self.noise[index]) + luck

    def groups(self):
        return torch.tensor(self.kinds)

    def count(self, edits):
        """How many paths of so many edits were scored."""
        return sum(sum(action != 1 for action in path) == edits for _, path in self.scored)


def test_sets_of_one_collection_are_one_group():
    def prompt(name):
        return LikelihoodPrompt(Question(name, name, "", (), (), ""), "", (1, 2), (), (), (), 0)

    prompts = [prompt(name) for name in ("arc_easy", "piqa", "arc_challenge", "openbookqa", "arc_easy")]
    assert groups_by_set(prompts).tolist() == [0, 1, 2, 3, 0]
    assert groups_by_set(prompts, collections_of("openbookqa,arc")).tolist() == [0, 1, 0, 2, 0]
    assert collections_of("arc_challenge,arc") == {"arc_challenge": "arc_challenge", "arc_easy": "arc"}


def test_each_kind_gets_its_own_path():
    rewards = KnownRewards(40)
    paths = LikelihoodPaths(rewards, rewards.groups(), Growth(pilot=10, keep=3, max_edits=3, price=0.001))
    assert [member.path for member in paths.chains[0]] == [(1,) * 6, (1, 1, 0, 1, 1, 1)]
    assert [member.path for member in paths.chains[1]] == [(1,) * 6, (1, 1, 1, 1, 0, 1), (1, 1, 1, 1, 0, 2)]
    labels = paths.labels()
    assert {label for label, kind in zip(labels, rewards.kinds, strict=True) if kind == 0} == {(1, 1, 0, 1, 1, 1)}
    assert {label for label, kind in zip(labels, rewards.kinds, strict=True) if kind == 1} == {(1, 1, 1, 1, 0, 2)}
    # a block application that costs more than a repeat gains
    assert set(paths.labels(price=0.04)) == {(1, 1, 0, 1, 1, 1), (1, 1, 1, 1, 0, 1)}


def test_the_price_rises_until_paths_are_short_enough():
    rewards = KnownRewards(40)
    paths = LikelihoodPaths(rewards, rewards.groups(), Growth(pilot=10, keep=3, max_edits=3, price=0.001))
    assert paths.price_within(5.5) == 0.001, "the paths of five and six blocks are short enough on average"
    price = paths.price_within(5.4)
    assert price == pytest.approx(0.03), "what the repeat of block 5 gains"
    assert set(paths.labels(price)) == {(1, 1, 0, 1, 1, 1), (1, 1, 1, 1, 0, 1)}
    with pytest.raises(UserError, match=r"take 5\.00 blocks on average, and --most_layers is 4"):
        paths.price_within(4)


def test_given_paths_are_chosen_among_and_none_is_grown():
    rewards = KnownRewards(40)
    given = [[(1, 1, 0, 1, 1, 1), (1, 1, 1, 0, 1, 1)], [(1, 1, 1, 1, 0, 2)]]
    validation = torch.arange(40) >= 38
    paths = LikelihoodPaths(rewards, rewards.groups(), Growth(price=0.001), validation, given)
    assert {path for _, path in rewards.scored} == {(1,) * 6, *given[0], *given[1]}
    assert len({index for index, _ in rewards.scored}) == 40, "training questions choose, too"
    assert [max(chain, key=lambda member: member.reward).path for chain in paths.chains] == [given[0][0], given[1][0]]


def test_dropped_edits_are_not_measured_again():
    rewards = KnownRewards(40)
    LikelihoodPaths(rewards, torch.zeros(40, dtype=torch.long), Growth(pilot=10, keep=4, max_edits=1, price=0.2))
    edits = 2 * NUM_BLOCKS
    assert rewards.count(1) == 10 * edits + 20 * 4 + 10 * 3  # all edits, the best four on 30, three on all 40


def test_heats_take_questions_of_every_set():
    rewards = KnownRewards(40)
    rewards.prompts = sorted(rewards.prompts, key=lambda prompt: prompt.question.id[-1] in "02468")
    for prompt in rewards.prompts[20:]:
        object.__setattr__(prompt.question, "set", "openbookqa")
    LikelihoodPaths(rewards, torch.zeros(40, dtype=torch.long), Growth(pilot=10, keep=1, max_edits=1))
    everything = [index for index, path in rewards.scored if path == (1, 2, 1, 1, 1, 1)]
    assert sorted(everything) == [0, 1, 2, 3, 4, 20, 21, 22, 23, 24]


def test_a_gain_within_its_error_is_not_adopted():
    rewards = KnownRewards(40)
    rewards.kinds = [0] * 40
    rewards.effect_noise = 0.1
    groups = torch.zeros(40, dtype=torch.long)
    assert len(LikelihoodPaths(rewards, groups, Growth(pilot=40, max_edits=1, caution=4.0)).chains[0]) == 1
    assert len(LikelihoodPaths(rewards, groups, Growth(pilot=40, max_edits=1, caution=0.0)).chains[0]) == 2


def test_validation_questions_choose_among_the_paths():
    rewards = KnownRewards(40)
    rewards.kinds = [0] * 30 + [1] * 10  # the validation questions are of the other kind
    validation = torch.arange(40) >= 30
    groups = torch.zeros(40, dtype=torch.long)
    growth = Growth(pilot=10, keep=3, max_edits=1, price=0.001, nominees=0)
    paths = LikelihoodPaths(rewards, groups, growth, validation)
    assert paths.chains[0][1].path == (1, 1, 0, 1, 1, 1)
    assert set(paths.labels()) == {(1,) * 6}
    assert not any(index >= 30 and 2 in path for index, path in rewards.scored)
    # a path that the training questions put second is what the validation questions want
    paths = LikelihoodPaths(rewards, groups, replace(growth, nominees=2), validation)
    assert set(paths.labels()) == {(1, 1, 1, 1, 0, 1)}
    assert len(paths.chains[0]) == 4
    # without validation questions there are no nominees
    paths = LikelihoodPaths(rewards, groups, replace(growth, nominees=2))
    assert len(paths.chains[0]) == 2


def test_paths_grown_at_further_prices_are_chosen_among():
    rewards = KnownRewards(40)
    validation = torch.arange(40) >= 30
    growth = Growth(pilot=10, keep=6, max_edits=2, price=0.02, nominees=1)
    alone = LikelihoodPaths(rewards, rewards.groups(), replace(growth, price=0.2), validation)
    both = LikelihoodPaths(rewards, rewards.groups(), replace(growth, further_prices=(0.2,)), validation)
    assert max(sum(action == 0 for action in member.path) for member in alone.chains[0]) == 2, "skips that cost 0.15"
    assert {member.path for member in both.chains[1]} > {(1, 1, 1, 1, 0, 1)}
    assert set(both.labels()) == {(1, 1, 0, 1, 1, 1), (1, 1, 1, 1, 0, 2)}, "the price alone chooses"


def test_questions_that_look_alike_form_a_group():
    rewards = KnownRewards(12)
    kinds = torch.tensor(rewards.kinds, dtype=torch.float32)
    windows = kinds[:, None, None, None].expand(-1, NUM_BLOCKS, 1, 4) + 0.01 * rewards.noise[:, None, None, None]
    rewards.windows = lambda paths: (windows.clone(), torch.ones(12, 1, dtype=torch.bool))
    groups = groups_by_states(rewards, 2)
    assert len(set(zip(groups.tolist(), rewards.kinds, strict=True))) == 2


@pytest.mark.parametrize("name", ["pilot", "keep", "candidates"])
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


def test_rewards_are_those_of_the_scores(toy, tmp_path):
    folder, data = toy
    _, tokenizer = search_toys.load(folder)
    routed = retrofit(str(folder), dtype=torch.float32).eval()
    prompts = [LikelihoodPrompt.of(question, tokenizer) for question in load_questions("arc_easy", "train", data)]
    store = ScoreStore(tmp_path, {})
    rewards = LikelihoodRewards(routed, prompts, store, PartialState(), batch_size=4)
    paths = [default_path(NUM_BLOCKS) if n % 2 else (1, 0, 0, 1, 1, 2) for n in range(len(prompts))]
    assert math.isnan(rewards.reward(prompts[0], paths[0]))
    rewards.score([[path] for path in paths], "test")
    for prompt, path in zip(prompts, paths, strict=True):
        scores = torch.tensor(store.get(prompt.question.id, path))
        assert rewards.reward(prompt, path) == pytest.approx(scores.softmax(0)[prompt.gold].item(), abs=1e-6)
        assert rewards.is_right(prompt, path) == (int(scores.argmax()) == prompt.gold)
    # the routers read the context alone, and along the path
    windows, _ = rewards.windows(paths)
    alone = routed.model(
        input_ids=torch.tensor([prompts[0].input_ids]), layer_indices=[0, 3, 4, 5, 5], output_router_inputs=True
    )
    torch.testing.assert_close(windows[0], alone.router_inputs[0])


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
    # other routers on the same measurements
    another = [*arguments.split(), "--router_seed", "1", "--measured_dir", str(tmp_path / "groups-measured")]
    assert group_paths.main([*another, "--output_dir", str(tmp_path / "another")]) == 0
    assert len((tmp_path / "groups-measured" / "00000.jsonl").read_bytes().splitlines()) == len(lines)
    other = load_file(tmp_path / "another" / "model.safetensors")
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed
    assert all("router" in name for name in changed)


def test_a_checkpoint_carries_the_knob_at_which_its_routers_abstain(toy, tmp_path):
    folder, data = toy
    arguments = f"--reward likelihood --model {folder} --data_dir {data} --dataset arc --group_by collection"
    arguments += " --train_questions 8 --validation_questions 4 --pilot 8 --keep 3 --most_skips 1 --batch_size 4"
    arguments += f" --price 0.5 --measured_dir {tmp_path}/measured"  # a price above every reward: a block is skipped
    knobs = {}
    for name, extra in (("all", ""), ("sure", "--keep_edits 0.5")):
        output = ["--output_dir", str(tmp_path / name)]
        assert group_paths.main([*arguments.split(), *extra.split(), *output]) == 0
        knobs[name] = json.loads((tmp_path / name / "config.json").read_text())["routing_control"]
    assert knobs["all"] == -0.5
    assert -0.5 < knobs["sure"] < 0.5


def test_the_program_takes_paths_from_a_file(toy, tmp_path, capsys):
    folder, data = toy
    arguments = (
        f"--reward likelihood --model {folder} --data_dir {data} --dataset arc --group_by collection --price 0.5"
    )
    arguments += f" --train_questions 8 --batch_size 4 --paths {tmp_path}/paths.json --output_dir {tmp_path}/given"
    (tmp_path / "paths.json").write_text('{"arc": ["skip 3", "skip 1, skip 2"], "arc_easy": ["repeat 4"]}')
    assert group_paths.main(arguments.split()) == 0
    manifest = json.loads((tmp_path / "given" / "labels_manifest.json").read_text())
    (group,) = manifest["groups"]
    assert [member["edits"] for member in group["chain"]] == ["", "skip 3", "skip 1, skip 2", "repeat 4"]
    for text, message in (
        ('{"arc": ["leave 3"]}', "arc is not a list of edits"),
        ('{"arc": ["skip 99"]}', "arc is not a list of edits"),
        ('{"arc": ["skip -1"]}', "arc is not a list of edits"),
        ('{"arc": ["skip 1, skip 2, skip 3"]}', "at most two skips in a row"),
        ('{"squad": ["skip 1"]}', "unknown question set 'squad'"),
    ):
        (tmp_path / "paths.json").write_text(text)
        assert group_paths.main(arguments.split()) != 0
        assert message in capsys.readouterr().err


def test_a_checkpoint_carries_the_domains_of_its_routers(toy, tmp_path):
    folder, data = toy
    arguments = f"--reward likelihood --model {folder} --data_dir {data} --dataset arc --group_by collection"
    arguments += " --train_questions 8 --validation_questions 4 --pilot 8 --keep 3 --most_skips 1 --batch_size 4"
    arguments += f" --price 0.5 --domain 1 --domain_rank 2 --output_dir {tmp_path}/domain"
    assert group_paths.main(arguments.split()) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "domain", trust_remote_code=True)
    joined = join_routers(tmp_path / "domain" / "routers")
    assert joined.config.router_domain == 2
    assert "outside of their domain (rank 2)" in (tmp_path / "domain" / "routers" / "README.md").read_text()
    assert all(torch.equal(joined.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    radii = [float(router.radius) for router in model.model.routers]
    assert sum(radius >= 0 for radius in radii) == 1, "the label of the only group skips one block"
    question = LikelihoodPrompt.of(load_questions("arc_easy", "train", data)[0], load_tokenizer(folder))
    assert 0 in model.model(torch.tensor([question.input_ids])).paths[0].tolist()
    for router in model.model.routers:
        router.radius.fill_(0.0)
    assert set(model.model(torch.tensor([question.input_ids])).paths[0].tolist()) == {1}


def test_the_next_step_tries_edits_that_are_known_to_help_before_lucky_ones():
    rewards = KnownRewards(40)
    rewards.effect_noise = 0.3  # on the ten questions of the first heat some of the bad edits look good
    gains = {(2, 0): 0.5, (3, 0): 0.2}
    rewards.value = lambda kind, path: (
        0.5 + sum(gains.get((block, action), 0.0) for block, action in enumerate(path) if action != 1)
    )
    growth = Growth(pilot=10, keep=2, candidates=1, finalists=2, max_edits=2, price=0.0)
    (chain,) = LikelihoodPaths(rewards, torch.zeros(40, dtype=torch.long), growth).chains
    assert [member.path for member in chain[1:]] == [(1, 1, 0, 1, 1, 1), (1, 1, 0, 0, 1, 1)]


def test_the_price_decides_which_edits_stay():
    rewards = KnownRewards(40)
    # repeating block 5 gains 0.03 for half of the questions, which a block application at 0.05 outweighs
    paths = LikelihoodPaths(rewards, rewards.groups(), Growth(pilot=20, keep=6, max_edits=2, price=0.05))
    assert set(paths.labels()) == {(1, 1, 0, 1, 1, 1), (1, 1, 1, 1, 0, 1)}
    assert {len(chain) for chain in paths.chains} == {2}
