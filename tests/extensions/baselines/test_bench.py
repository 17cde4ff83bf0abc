"""The bench by itself: what it keeps on disk belongs to one model, knob and prompt, and sets are told apart."""

from types import SimpleNamespace

import pytest
import torch

from drllm.checkpoints import load_routed_checkpoint, load_tokenizer
from drllm.errors import UserError
from drllm.questions.sets import load_questions
from drllm.rollouts.rewards import reward_named
from drllm.rollouts.routed_paths import routed_paths
from extensions.baselines.bench import Bench
from extensions.baselines.outcomes import Outcome
from tests import search_toys
from tests.eval_toys import make_routed


@pytest.fixture(scope="module")
def toy(tmp_path_factory, stock_model):
    """(routed model, tokenizer, questions)."""
    folder = tmp_path_factory.mktemp("bench")
    base = search_toys.make_model(folder / "model", stock_model)
    routed = load_routed_checkpoint(make_routed(base, folder / "routed"), torch.float32, "cpu")
    data = search_toys.make_data(folder / "data", 6, seed=5)
    return routed, load_tokenizer(str(base)), load_questions("arc_easy", "train", data)


def test_decisions_belong_to_routers_knob_and_prompts(toy, tmp_path):
    routed, tokenizer, questions = toy
    bench = Bench(routed, tokenizer, reward_named("likelihood"), ([], questions), tmp_path, 4)
    own = routed_paths(routed, bench.prompts)
    assert len(set(own)) > 1
    assert bench.decisions(routed, bench.prompts, 0.5) == bench.default, "the knob at the base model"
    assert routed.model.routing_control == -0.5, "the knob does not stay set"
    assert bench.decisions(routed, bench.prompts) == own
    assert bench.decisions(routed, bench.prompts[::-1]) == own[::-1]
    assert bench.decisions(routed, bench.prompts, 0.5) == bench.default, "from the disk"
    last = [layer for layer in routed.model.routers[2].modules() if isinstance(layer, torch.nn.Linear)][-1]
    kept = last.bias.detach().clone()
    try:
        with torch.no_grad():
            last.bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
        assert {path[2] for path in bench.decisions(routed, bench.prompts)} == {0}
    finally:
        last.bias.data.copy_(kept)


def test_a_training_question_is_no_test_question(toy, tmp_path):
    routed, tokenizer, questions = toy
    with pytest.raises(UserError, match=f"1 test questions are also training questions, e.g. {questions[2].id}"):
        Bench(routed, tokenizer, reward_named("likelihood"), (questions[:3], questions[2:]), tmp_path, 4)


def test_each_set_has_numbers_of_its_own():
    prompts = [SimpleNamespace(question=SimpleNamespace(set=name)) for name in ("a", "b", "a", "b", "b")]
    outcome = Outcome([1.0, 0.0, 1.0, 1.0, 0.0], [6.0, 4.0, 4.0, 4.0, 1.0], [0.0] * 5, [1.0, 0.0, 1.0, 1.0, 1.0])
    sets = Bench.per_set(SimpleNamespace(prompts=prompts), outcome)
    assert sets["a"] == {"accuracy": 1, "layers": 5, "answered": 1, "accuracy_of_answered": 1, "questions": 2}
    assert sets["b"]["accuracy_of_answered"] == 1 / 2
    some = Bench.per_set(SimpleNamespace(prompts=prompts), outcome.of([1, 2]), [1, 2])
    assert {name: row["accuracy"] for name, row in some.items()} == {"b": 0, "a": 1}
