"""MindSkip on toys whose right paths are known, and its budget."""

from collections import Counter

import pytest
import torch

from drllm.provenance import fingerprint
from drllm.questions.prompts import Prompt
from drllm.questions.sets import Question
from extensions.baselines import gated_blocks
from extensions.baselines.gated_blocks import GateTraining
from extensions.baselines.interface import Answered, fit_once
from extensions.baselines.mindskip import MindSkip, SequenceGates
from tests.baseline_toys import NO_PROGRESS, toy_bench
from tests.search_toys import answered_questions
from train_models.paths import path_to_layer_indices

PATHS = {2: (1, 0, 1, 1, 1, 1), 3: (1, 1, 1, 1, 0, 1)}  # by the first token, the kind
DEFAULT = dict.fromkeys(PATHS, (1,) * 6)


def questions_along(routed, count: int, seed: int, paths: dict[int, tuple]) -> list[Answered]:
    """Questions of two kinds, answered by the model itself along the path of their kind."""
    generator = torch.Generator().manual_seed(seed)
    questions = []
    for number in range(count):
        kind = 2 + number % 2
        length = int(torch.randint(3, 9, (1,), generator=generator))
        tokens = [kind, *torch.randint(4, 61, (length,), generator=generator).tolist()]
        prompt = tuple(tokens)
        with torch.no_grad():
            for _ in range(6):
                indices = path_to_layer_indices(paths[kind])
                logits = routed(torch.tensor([tokens]), layer_indices=indices, use_cache=False).logits
                tokens.append(int(logits[0, -1].argmax()))
        question = Question("dart-1", f"{seed}-{number}", "", (), (), "0")
        questions.append(Answered(Prompt(question, "", prompt, 5), tuple(tokens[len(prompt) :])))
    return questions


def fitted_paths(rival: MindSkip, routed, questions, skips: int, unseen=None):
    """(paths of `unseen`, or of the training questions; cost) of MindSkip fitted on `questions`."""
    fitted, cost = rival.fit(toy_bench(routed, questions), skips, 0, NO_PROGRESS)
    prompts = [question.prompt for question in unseen or questions]
    return rival.trained_gates(routed, fitted).paths(routed, prompts), cost


def untrained(routed, seed: int = 0) -> SequenceGates:
    gates = SequenceGates(routed.config.num_hidden_layers, routed.config.hidden_size)
    torch.nn.init.normal_(gates.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    torch.nn.init.zeros_(gates.bias)
    return gates


def test_blocks_that_return_their_input_are_skipped_for_every_prompt(routed_with_idle_blocks):
    questions = questions_along(routed_with_idle_blocks, 16, 0, DEFAULT)
    training = GateTraining(epochs=40, batch_size=8, learning_rate=3e-3)
    paths, cost = fitted_paths(MindSkip(training), routed_with_idle_blocks, questions, 2)
    assert Counter(paths).most_common(1)[0][0] == (1, 1, 0, 1, 0, 1)
    assert cost.parameters == 6 * (32 + 1)


def test_each_kind_of_prompt_gets_the_path_that_its_answers_were_made_along(routed):
    training = GateTraining(epochs=12, batch_size=8, learning_rate=3e-3)
    before = fingerprint(routed)
    unseen = questions_along(routed, 20, 1, PATHS)
    paths, _ = fitted_paths(MindSkip(training), routed, questions_along(routed, 96, 0, PATHS), 1, unseen)
    for kind in PATHS:
        of_kind = [path for path, question in zip(paths, unseen, strict=True) if question.prompt.input_ids[0] == kind]
        assert of_kind.count(PATHS[kind]) > len(of_kind) / 2
    assert fingerprint(routed) == before


@pytest.mark.parametrize("skips", [1, 3])
def test_the_capacity_reaches_its_target(routed, skips):
    """Router-Tuning reports that the share of executed blocks reaches the target, for any target."""
    questions = questions_along(routed, 24, 0, DEFAULT)
    paths, _ = fitted_paths(MindSkip(GateTraining(epochs=20, batch_size=8)), routed, questions, skips)
    assert sum(map(sum, paths)) / len(paths) == pytest.approx(6 - skips, abs=0.3)


def test_calibration_meets_the_budget(routed):
    questions = answered_questions(12)
    gates = untrained(routed)
    gated_blocks.calibrate(gates, routed, questions, 4.0)
    with torch.no_grad(), gates.attached(routed):
        prompts = [question.prompt.input_ids for question in questions]
        gates.run(routed, prompts, [len(prompt) for prompt in prompts])
    assert gates.blocks().mean().item() == pytest.approx(4, abs=0.1)


def test_gates_give_the_hidden_states_of_the_path_that_they_decide_on(routed):
    """Also: the decision reads the prompt alone, and neither batch mates nor padding matter."""
    questions = answered_questions(5)
    gates = untrained(routed)
    rows = [[*question.prompt.input_ids, *question.answer_ids] for question in questions]
    lengths = [len(question.prompt.input_ids) for question in questions]
    with torch.no_grad(), gates.attached(routed):
        hidden = gates.run(routed, rows, lengths)
    paths = gates.decisions().tolist()
    assert len({tuple(path) for path in paths}) > 1
    restored = MindSkip().trained_gates(routed, gates.state_dict())
    from_prompts = restored.paths(routed, [question.prompt for question in questions], 2)
    assert [list(path) for path in from_prompts] == paths
    for row, path, states in zip(rows, paths, hidden, strict=True):
        with torch.no_grad():
            alone = routed.model(
                torch.tensor([row]), layer_indices=path_to_layer_indices(path), use_cache=False
            ).last_hidden_state[0]
        torch.testing.assert_close(states[: len(row)], alone, rtol=1e-4, atol=1e-4)


def test_a_stopped_training_is_resumed(routed, tmp_path, monkeypatch):
    questions = answered_questions(8)
    rival = MindSkip(GateTraining(epochs=6, batch_size=2))
    expected, _ = rival.fit(toy_bench(routed, questions), 1, 0, NO_PROGRESS)

    class Stop(Exception):
        pass

    steps = []
    original = gated_blocks.language_model_loss

    def stopping(*arguments):
        steps.append(1)
        if len(steps) == 15:
            raise Stop
        return original(*arguments)

    monkeypatch.setattr(gated_blocks, "SAVE_SECONDS", 0)
    monkeypatch.setattr(gated_blocks, "language_model_loss", stopping)
    with pytest.raises(Stop):
        fit_once(rival, toy_bench(routed, questions, tmp_path), 1, 0)
    steps.clear()
    steps += [1] * 100
    fitted, cost = fit_once(rival, toy_bench(routed, questions, tmp_path), 1, 0)
    assert len(steps) == 100 + 24 - 14, "the first 14 steps are not repeated"
    torch.testing.assert_close(fitted, dict(expected))
    # A third call trains nothing, and knows what the training took.
    again, cost_again = fit_once(rival, toy_bench(routed, questions, tmp_path), 1, 0)
    assert len(steps) == 110
    assert cost_again == cost
    assert [path.suffix for path in (tmp_path / "fitted").iterdir()] == [".safetensors"]
    torch.testing.assert_close(again, fitted)
