"""Effects of single changes, against whole passes one at a time; routers that learn them; the price of a block."""

import dataclasses

import pytest
import torch

from drllm.effects import LOGIT_SCALE, Answered, EffectRound, fit, measure, with_price
from drllm.rollout import Prompt
from drllm.router_modules import StackedRouters
from drllm.tasks import Question
from train_models import retrofit
from train_models.paths import path_to_layer_indices

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
def test_effects_equal_whole_passes(family, stock_checkpoint):
    routed = retrofit(stock_checkpoint(family), dtype=torch.float32).eval()
    asked = questions(5)
    paths = [(1,) * 6, (0, 1, 2, 1, 1, 1), (2, 0, 0, 1, 1, 2), (1, 1, 1, 1, 0, 0), (0, 0, 0, 0, 1, 0)]
    measured = measure(routed, asked, paths, batch_size=3)
    for number, (each, path) in enumerate(zip(asked, paths, strict=True)):
        ids = torch.tensor([[*each.prompt.input_ids, *each.answer_ids]])
        start = len(each.prompt.input_ids)
        for block in range(NUM_BLOCKS):
            for action in range(3):
                changed = (*path[:block], action, *path[block + 1 :])
                if not sum(changed):
                    assert measured.probabilities[number, block, action].isnan()
                    continue
                with torch.no_grad():
                    logits = routed(ids[:, :-1], layer_indices=path_to_layer_indices(changed)).logits[0, start - 1 :]
                expected = logits.softmax(-1).gather(1, ids[0, start:, None]).prod()
                torch.testing.assert_close(
                    measured.probabilities[number, block, action], expected, rtol=1e-3, atol=1e-7
                )
        with torch.no_grad():
            alone = routed(ids[:, :start], layer_indices=path_to_layer_indices(path), output_router_inputs=True)
        torch.testing.assert_close(measured.windows[number], alone.router_inputs[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(measured.window_mask[number], alone.window_mask[0])


def toy_round(count: int = 400) -> EffectRound:
    """Skipping block 0 helps exactly the prompts whose first feature is positive, and repeating never helps."""
    generator = torch.Generator().manual_seed(1)
    windows = torch.randn(count, 2, 4, 8, generator=generator)
    windows[..., 0] = windows[:, :, :1, 0]
    helps = windows[:, 0, 0, 0] > 0
    probabilities = torch.full((count, 2, 3), 0.5)
    probabilities[:, 0, 0] += torch.where(helps, 0.2, -0.2)
    probabilities[:, :, 2] -= 0.1
    probabilities[0, 1, 0] = float("nan")
    return EffectRound([(1, 1)] * count, probabilities, windows, torch.ones(count, 4, dtype=torch.bool))


def test_routers_learn_what_can_be_known_and_the_price_moves_them(stock_checkpoint):
    routed = retrofit(
        stock_checkpoint("llama", hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    )
    routers = StackedRouters(routed.model.routers)
    measured = toy_round()
    fit(routers, [measured], epochs=40, learning_rate=1e-2, weight_decay=0.01, batch_size=16, seed=0)
    logits = routers(measured.windows, measured.window_mask)["logits"]
    clear = measured.windows[:, 0, 0, 0].abs() > 0.3
    actions = logits.argmax(-1)
    helps = measured.windows[:, 0, 0, 0] > 0
    assert (actions[clear, 0] == torch.where(helps[clear], 0, 1)).float().mean() > 0.95
    assert not (actions == 2).any()
    routers.copy_to(routed.model.routers)
    before = [router.layers[-1].bias.clone() for router in routed.model.routers]
    with_price(routed.model.routers, 0.3)
    for router, bias in zip(routed.model.routers, before, strict=True):
        torch.testing.assert_close(bias - router.layers[-1].bias, LOGIT_SCALE * 0.3 * torch.arange(3.0))
        priced = router(measured.windows[:, 0], measured.window_mask).argmax(-1)
    assert (priced == 0).all(), "at a price above every effect all blocks are skipped"
    with_price(routed.model.routers, 0.0, margin=2.0)
    for router in routed.model.routers:
        assert (router(measured.windows[:, 0], measured.window_mask).argmax(-1) == 1).all()


def test_the_same_seed_gives_the_same_routers(stock_checkpoint):
    changes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    weights = []
    for seed in (0, 0, 1):
        routers = StackedRouters(retrofit(stock_checkpoint("llama", **changes)).model.routers)
        fit(routers, [toy_round(50)], epochs=2, learning_rate=1e-2, weight_decay=0.0, batch_size=16, seed=seed)
        weights.append(routers.weights[0].detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_answers_have_the_form_that_the_prompt_asks_for():
    class Tokenizer:
        eos_token_id = 9

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [text]}

    letter = Question("arc_easy", "a", "?", ("x", "y"), ("A", "B"), "B")
    number = dataclasses.replace(letter, set="dart-3", choices=(), labels=(), answer="42")
    texts = [Answered.of(Prompt(each, "", (1,), 5), Tokenizer()).answer_ids for each in (letter, number)]
    assert texts == [(" B", 9), (" \\boxed{42}", 9)]
