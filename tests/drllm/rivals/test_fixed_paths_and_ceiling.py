"""ShortGPT and LayerSkip by name, and the ceiling: a search that knows the answers."""

from drllm.provenance import fingerprint
from drllm.questions.prompts import Prompt
from drllm.questions.sets import Question
from drllm.rivals import CoLa, fit_once, layer_skip, random_paths, short_gpt
from drllm.rivals.routed import random_skips
from drllm.rollouts.engine import Rollout
from drllm.rollouts.scores import ScoreStore
from tests.search_toys import answered_questions


def test_shortgpt_skips_blocks_that_return_their_input_and_is_fitted_once(routed_with_idle_blocks, tmp_path):
    questions = answered_questions(5)
    fitted = fit_once(short_gpt(), routed_with_idle_blocks, questions, 2, 0, tmp_path)
    assert fitted.path == (1, 1, 0, 1, 0, 1)
    assert (fitted.cost.parameters, fitted.cost.changes_base) == (0, False)
    # From the folder: another base would be needed for another answer.
    again = fit_once(short_gpt(), routed_with_idle_blocks, questions, 2, 0, tmp_path)
    assert (again.path, again.cost) == (fitted.path, fitted.cost)
    assert len(list(tmp_path.iterdir())) == 1
    fit_once(short_gpt(), routed_with_idle_blocks, questions, 1, 0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "another budget is another fit"


def test_layerskip_skips_the_last_blocks(routed, tmp_path):
    before = fingerprint(routed)
    assert fit_once(layer_skip(), routed, [], 2, 0, tmp_path).path == (1, 1, 1, 1, 0, 0)
    assert fingerprint(routed) == before


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
    outcome = CoLa().outcome(engine, prompts, ScoreStore(tmp_path, {}))
    assert outcome.right == [1.0, 1.0, 0.0]
    assert outcome.layers[2] == 6, "no right path: the default path"
    evaluated = engine.evaluated
    assert CoLa().outcome(engine, prompts, ScoreStore(tmp_path, {})) == outcome
    assert engine.evaluated == evaluated, "a second run searches nothing"
    assert "uses the test answer" in CoLa.name
