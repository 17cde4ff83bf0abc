"""Rewards: names, what they refuse, and that engine and judge agree with the engine's own rollouts."""

import pytest
import torch

from drllm.checkpoints import load_routed, load_tokenizer
from drllm.errors import UserError
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.questions.sets import load_questions
from drllm.rollouts.engine import Request
from drllm.rollouts.rewards import REWARDS, reward_named
from tests import search_toys


@pytest.fixture(scope="module")
def toy(tmp_path_factory, stock_model):
    folder = tmp_path_factory.mktemp("rewards")
    base = search_toys.make_model(folder / "model", stock_model)
    data = search_toys.make_data(folder / "data", 8, seed=5)
    return load_routed(str(base), torch.float32, None, {}).eval(), load_tokenizer(str(base)), data


@pytest.mark.parametrize("name", REWARDS)
def test_scores_judge_as_the_engine_does(toy, name):
    model, tokenizer, data = toy
    reward = reward_named(name)
    assert reward.name == name
    prompts = [reward.prompt_of(question, tokenizer) for question in load_questions("arc_easy", "train", data)]
    engine = reward.engine(model, tokenizer, 4)
    requests = [Request(prompt, path) for prompt in prompts for path in ((1,) * 6, (1, 0, 1, 1, 2, 1))]
    scores = engine.score(requests)
    rollouts = reward.engine(model, tokenizer, 4).respond(requests)
    assert [reward.is_right(r.prompt, row) for r, row in zip(requests, scores, strict=True)] == [
        rollout.is_right for rollout in rollouts
    ]
    known = [reward.rollout(r.prompt, row) for r, row in zip(requests, scores, strict=True)]
    assert known == (rollouts if reward.has_options else [None] * len(requests))
    assert all(0 <= reward.value(r.prompt, row) <= 1 for r, row in zip(requests, scores, strict=True))


def test_a_likelihood_needs_options_and_has_no_chat_template(toy):
    reward = reward_named("likelihood")
    with pytest.raises(UserError, match="dart-1 is not multiple choice, so --reward likelihood cannot judge it"):
        reward.check_sets(["arc_easy", "dart-1"])
    with pytest.raises(UserError, match="no chat template"):
        reward.uses_chat_template("on", "model", toy[1], None)
    assert not reward.uses_chat_template("auto", "model-instruct", toy[1], None)[0]
    with pytest.raises(UserError, match="--strict_letters shapes responses, but --reward likelihood generates none"):
        reward.check_format("auto", inject_boxed=False, strict_letters=True)
    with pytest.raises(UserError, match=r"'reward' is .luck., not one of generation, likelihood, likelihood_norm"):
        reward_named("luck")


def test_lengths_count_in_the_normalised_reward_alone():
    prompt = LikelihoodPrompt(None, "", (), (), (), lengths=(1, 9), gold=1)
    rewards = [reward_named("likelihood"), reward_named("likelihood_norm")]
    assert [reward.is_right(prompt, (-2.0, -9.0)) for reward in rewards] == [False, True]
    assert [reward.metric for reward in rewards] == ["acc,none", "acc_norm,none"]
