"""The ceiling, a search that knows the answers, and random paths by their rates."""

from collections import Counter
from types import SimpleNamespace

from drllm.questions.prompts import Prompt
from drllm.questions.sets import Question
from drllm.rollouts.engine import Rollout
from drllm.rollouts.scores import ScoreStore
from extensions.baselines.ceiling import NAME, ceiling
from extensions.baselines.routed import control_at, random_paths, random_skips


def test_random_skips_save_the_budget_in_every_path():
    paths = random_skips(6, 2, 50, seed=0)
    assert {sum(path) for path in paths} == {4}
    assert len(set(paths)) > 5
    assert paths == random_skips(6, 2, 50, seed=0) != random_skips(6, 2, 50, seed=1)
    assert {sum(path) for path in random_paths(paths, 0)} != {4}, "rates per block, not per path"


class OneBlockSpoilsIt:
    """Answers are right exactly where the block of the question's number is skipped; "hopeless" ones never are."""

    num_blocks, batch_size = 6, 4

    def __init__(self) -> None:
        self.evaluated = 0

    def respond(self, requests) -> list[Rollout]:
        self.evaluated += len(requests)
        return [
            Rollout("", r.prompt.question.id.isdigit() and r.path[int(r.prompt.question.id)] == 0) for r in requests
        ]

    def forget(self, question) -> None:
        pass


def test_the_ceiling_finds_the_path_that_the_answer_needs_and_is_resumed(tmp_path):
    prompts = [Prompt(Question("dart-1", name, "", (), (), "0"), "", (4, 5), 5) for name in ("1", "4", "hopeless")]
    engine = OneBlockSpoilsIt()
    outcome = ceiling(engine, prompts, ScoreStore(tmp_path, {}))
    assert outcome.right == [1.0, 1.0, 0.0]
    assert outcome.layers[2] == 6, "no right path: the default path"
    evaluated = engine.evaluated
    assert ceiling(engine, prompts, ScoreStore(tmp_path, {})) == outcome
    assert engine.evaluated == evaluated, "a second run searches nothing"
    assert "uses the test answer" in NAME


def bench_whose_layers_are(layers):
    """A bench on which one question runs `layers(control)` blocks."""
    return SimpleNamespace(decisions=lambda routed, prompts, control: [(layers(control),)])


def test_the_knob_meets_the_budget_or_comes_closest():
    smooth = bench_whose_layers_are(lambda control: 800 * (control + 1) / 1.5)
    assert abs(control_at(smooth, None, 300, ["a prompt"]) + 0.4375) < 1.5 / 2**7
    jump = bench_whose_layers_are(lambda control: 10 if control > 0.08 else 2)
    assert control_at(jump, None, 5, ["a prompt"]) <= 0.08, "2 blocks are nearer to 5 than 10"


def test_random_paths_keep_the_rates_of_each_block():
    paths = [(1, 0, 2), (1, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 2)]
    shuffled = random_paths(paths, seed=0)
    for drawn, decided in zip(zip(*shuffled, strict=True), zip(*paths, strict=True), strict=True):
        assert Counter(drawn) == Counter(decided)
    assert random_paths(paths, seed=0) == shuffled
    assert any(random_paths(paths, seed) != shuffled for seed in range(1, 5))
