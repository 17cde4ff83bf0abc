"""CoLa (Li et al. 2025, arXiv 2507.07996): search for each test question, with its gold answer. A ceiling.

CoLa ("chain of layers") runs a Monte Carlo tree search at test time and keeps, for each question, a path along which
the answer is right. Telling right from wrong **uses the test answer**, so no deployed method can do this; the result
bounds what one path per question could reach. The search is the one that makes labels (`drllm.search`), on test
questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from drllm.evaluation.outcomes import Outcome
from drllm.rivals.interface import AnyPrompt
from drllm.rollouts.scores import ScoreStore
from drllm.search.pool import SearchPool
from drllm.search.tree import SearchSettings
from train_models.paths import Path, default_path


@dataclass(frozen=True)
class CoLa:
    """The ceiling of one path per question; it is not fitted.

    search: settings of each question's search, the paper's by default.
    concurrency: questions searched at once.
    """

    search: SearchSettings = field(default_factory=SearchSettings)
    concurrency: int = 32

    name = "CoLa ceiling (uses the test answer)"

    def outcome(self, engine, prompts: Sequence[AnyPrompt], store: ScoreStore, seed: int = 0) -> Outcome:
        """The shortest right path that the search finds per question; where there is none, the default path.

        Args:
            engine: a `RolloutEngine` or `LikelihoodEngine`.
            store: keeps each question's result (whether a path is right, and the path), so that a stopped run resumes.
        """
        waiting = [prompt for prompt in prompts if store.get(prompt.question.id, ()) is None]
        default = default_path(engine.num_blocks)
        pool = SearchPool(engine, self.search, seed, self.concurrency)
        for searched in tqdm(pool.search(waiting), total=len(waiting), desc="searching", unit="question"):
            path: Path = searched.result.best_path or default
            is_right = searched.result.base_correct or searched.result.best_path is not None
            store.add([(searched.prompt.question.id, (), (float(is_right), *map(float, path)))])
        kept = [store.get(prompt.question.id, ()) for prompt in prompts]
        return Outcome([row[0] for row in kept], [sum(row[1:]) for row in kept])
