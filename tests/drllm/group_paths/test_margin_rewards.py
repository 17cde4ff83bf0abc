"""Margin rewards against whole passes one at a time; rounds that are stored, resumed and shared."""

import dataclasses

import pytest
import torch
from accelerate import PartialState

from drllm.errors import UserError
from drllm.group_paths import margin_rewards
from drllm.group_paths.margin_rewards import MARGIN_SCALE, Answered, MarginRewards, RoundStore
from drllm.questions.prompts import Prompt
from drllm.questions.sets import Question
from tests.search_toys import answered_questions as questions
from train_models import retrofit
from train_models.paths import path_to_layer_indices

NUM_BLOCKS = 6


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_rewards_equal_whole_passes(family, stock_checkpoint):
    routed = retrofit(stock_checkpoint(family), dtype=torch.float32).eval()
    gold = questions(5)
    paths = [(1,) * 6, (0, 1, 2, 1, 1, 1), (2, 0, 0, 1, 1, 2), (1, 1, 1, 1, 0, 0), (0, 0, 0, 0, 1, 0)]
    measured = MarginRewards(routed, gold, batch_size=3).around(paths, actions=(0, 1, 2))
    for number, (answered, path) in enumerate(zip(gold, paths, strict=True)):
        ids = torch.tensor([[*answered.prompt.input_ids, *answered.answer_ids]])
        start = len(answered.prompt.input_ids)
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


def test_actions_that_were_not_measured_are_nan(stock_checkpoint):
    routed = retrofit(stock_checkpoint("llama"), dtype=torch.float32).eval()
    measured = MarginRewards(routed, questions(2)).around([(1,) * 6, (2, 1, 1, 0, 1, 1)], actions=(0,))
    known = measured.rewards.isfinite()
    assert known[:, :, 0].all()
    assert known[0, :, 1].all()
    assert not known[0, :, 2].any()
    assert known[1, :, 2].tolist() == [True] + [False] * 5, "the path's own actions are known"
    torch.testing.assert_close(measured.own(), measured.rewards[torch.arange(2), 0, torch.tensor([1, 2])])


def test_windows_are_those_of_a_question_alone(stock_checkpoint):
    routed = retrofit(stock_checkpoint("llama"), dtype=torch.float32).eval()
    gold, paths = questions(3), [(1,) * 6, (0, 1, 2, 1, 1, 1), (1, 1, 0, 0, 1, 1)]
    along = MarginRewards(routed, gold, batch_size=2).around(paths, actions=())
    for number, (answered, path) in enumerate(zip(gold, paths, strict=True)):
        ids = torch.tensor([answered.prompt.input_ids])
        with torch.no_grad():
            alone = routed(ids, layer_indices=path_to_layer_indices(path), output_router_inputs=True)
        torch.testing.assert_close(along.windows[number], alone.router_inputs[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(along.window_mask[number], alone.window_mask[0])


def test_gold_answers_have_the_form_that_the_prompt_asks_for():
    class Tokenizer:
        eos_token_id = 9

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [text]}

    letter = Question("arc_easy", "a", "?", ("x", "y"), ("A", "B"), "B")
    number = dataclasses.replace(letter, set="dart-3", choices=(), labels=(), answer="42")
    texts = [Answered.of(Prompt(each, "", (1,), 5), Tokenizer()).answer_ids for each in (letter, number)]
    assert texts == [(" B", 9), (" \\boxed{42}", 9)]


@pytest.fixture
def measured_questions(monkeypatch, stock_checkpoint):
    """(a function that measures into a store and returns the round and how many questions it had to run)."""
    monkeypatch.setattr(margin_rewards, "PART_QUESTIONS", 2)
    routed = retrofit(stock_checkpoint("llama"), dtype=torch.float32).eval()
    gold = questions(7)
    paths = [
        (1,) * 6,
        (0, 1, 2, 1, 1, 1),
        (1, 1, 0, 1, 1, 1),
        (1,) * 6,
        (2, 1, 1, 1, 0, 1),
        (1,) * 6,
        (1, 0, 1, 1, 1, 1),
    ]
    ran = []
    original = margin_rewards._measure_batch

    def counted(model, batch, *arguments):
        ran.append(len(batch))
        if ran[0] == "stop" and len(ran) == 3:
            raise KeyboardInterrupt
        return original(model, batch, *arguments)

    monkeypatch.setattr(margin_rewards, "_measure_batch", counted)

    def call(store, paths=paths, stops=False, **arguments):
        ran[:] = ["stop"] if stops else ["run"]
        try:
            return MarginRewards(routed, gold, store=store).around(paths, **arguments), sum(ran[1:])
        except KeyboardInterrupt:
            return None, sum(ran[1:])

    return call


def store_at(folder, model="m") -> RoundStore:
    return RoundStore(folder, model, PartialState(cpu=True))


def same(one, other) -> bool:
    pairs = ((one.rewards, other.rewards), (one.windows, other.windows), (one.window_mask, other.window_mask))
    return one.paths == other.paths and all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in pairs)


def test_a_stopped_round_is_resumed(measured_questions, tmp_path):
    expected, ran = measured_questions(None)
    assert ran == 7
    nothing, _ = measured_questions(store_at(tmp_path), stops=True)
    assert nothing is None
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    again, ran = measured_questions(store_at(tmp_path))
    assert same(again, expected)
    assert ran == 5
    again, ran = measured_questions(store_at(tmp_path))
    assert same(again, expected)
    assert ran == 0


def test_a_truncated_part_is_measured_again(measured_questions, tmp_path):
    expected, _ = measured_questions(store_at(tmp_path))
    part = sorted(tmp_path.rglob("*.safetensors"))[1]
    part.write_bytes(part.read_bytes()[:-5])
    again, ran = measured_questions(store_at(tmp_path))
    assert same(again, expected)
    assert ran == 2


def test_rounds_of_other_arguments_are_not_mixed_up(measured_questions, tmp_path):
    measured_questions(store_at(tmp_path))
    for arguments in ({"paths": [(1,) * 6] * 7}, {"actions": (0,)}, {"with_windows": False}):
        assert measured_questions(store_at(tmp_path), **arguments)[1] == 7
    assert measured_questions(store_at(tmp_path, model="another"))[1] == 7


def test_a_folder_that_cannot_be_made_is_named(measured_questions, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        measured_questions(store_at(tmp_path / "file"))
