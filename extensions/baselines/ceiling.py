"""The ceiling of one path per question: search for each test question, with its gold answer (CoLa, arXiv 2507.07996).

CoLa ("chain of layers", Li et al. 2025) runs a Monte Carlo tree search at test time and keeps, for each question, a
path along which the answer is right. Telling right from wrong **uses the test answer**, so no deployed method can do
this. The search is the one that makes labels (`drllm.search`), on test questions.
"""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from drllm.rollouts.rewards import AnyPrompt
from drllm.rollouts.scores import ScoreStore
from drllm.search.pool import SearchPool
from drllm.search.tree import SearchSettings
from extensions.baselines.outcomes import Outcome
from train_models.paths import Path, default_path

NAME = "CoLa ceiling (uses the test answer)"
CONCURRENCY = 32  # questions searched at once


def ceiling(engine, prompts: Sequence[AnyPrompt], store: ScoreStore, seed: int = 0) -> Outcome:
    """The shortest right path that the published search finds per question; where there is none, the default path.

    Args:
        engine: a `RolloutEngine` or `LikelihoodEngine`.
        store: keeps each question's result (whether a path is right, and the path), so that a stopped run resumes.
    """
    waiting = [prompt for prompt in prompts if store.get(prompt.question.id, ()) is None]
    default = default_path(engine.num_blocks)
    pool = SearchPool(engine, SearchSettings(), seed, CONCURRENCY)
    for searched in tqdm(pool.search(waiting), total=len(waiting), desc="searching", unit="question"):
        path: Path = searched.result.best_path or default
        is_right = searched.result.base_correct or searched.result.best_path is not None
        store.add([(searched.prompt.question.id, (), (float(is_right), *map(float, path)))])
    kept = [store.get(prompt.question.id, ()) for prompt in prompts]
    right = [row[0] for row in kept]
    return Outcome(right, [sum(row[1:]) for row in kept], right)
