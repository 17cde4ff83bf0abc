"""The searches of many questions side by side, so that their rollouts fill batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from drllm.rollouts.engine import Request, Rollout
from drllm.rollouts.rewards import AnyEngine, AnyPrompt
from drllm.search.tree import PathSearch, SearchResult, SearchSettings, question_seed
from train_models.paths import Path


@dataclass(frozen=True)
class SearchedQuestion:
    """A finished search. Where a label was not wanted, only the default path was evaluated (0 simulations)."""

    prompt: AnyPrompt
    result: SearchResult
    base_response: str
    path_response: str | None  # along the best path


@dataclass
class _OpenSearch:
    prompt: AnyPrompt
    search: PathSearch
    responses: dict[Path, str] = field(default_factory=dict)  # of right paths and of the default path

    def request(self) -> Request:
        """The next rollout; the default path's response is generated to its end, because it is recorded."""
        return Request(self.prompt, self.search.request, to_the_end=self.search.base_correct is None)

    def close(self) -> SearchedQuestion:
        """The finished search."""
        result = self.search.result()
        best = None if result.best_path is None else self.responses[result.best_path]
        return SearchedQuestion(self.prompt, result, self.responses[self.search.root.path], best)


class SearchPool:
    """Runs the searches of many questions side by side, so that their rollouts fill batches.

    A question's result depends only on the settings, `seed`, its id and the model.

    Args:
        engine: evaluates paths.
        settings: settings of every search.
        seed: together with the question's id the seed of its search.
        concurrency: most questions searched at once.
        is_wanted: called with (prompt, whether the default path is right); if False the search of the question ends.
        after_round: called after each round of rollouts (one per open search) with the simulations of all searches.
    """

    def __init__(
        self,
        engine: AnyEngine,
        settings: SearchSettings,
        seed: int,
        concurrency: int,
        is_wanted: Callable[[AnyPrompt, bool], bool] = lambda prompt, base_correct: True,
        after_round: Callable[[int], None] = lambda simulations: None,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.seed = seed
        self._batches_at_once = concurrency / engine.batch_size
        self.is_wanted = is_wanted
        self.after_round = after_round
        self.simulations = 0

    def search(self, prompts: Iterable[AnyPrompt]) -> Iterator[SearchedQuestion]:
        """Yields every question as soon as its search ends.

        `prompts` is read lazily, so memory does not grow with their number.
        """
        waiting = iter(prompts)
        has_more = True
        searches: list[_OpenSearch] = []
        while True:
            # When batches are halved for lack of memory, fewer questions may hold states too.
            most = max(1, round(self._batches_at_once * self.engine.batch_size))
            # New questions start in groups, because default paths are batched separately.
            group = min(self.engine.batch_size, -(-most // 2))
            if has_more and len(searches) <= most - group:
                new = [self._open(prompt) for prompt in itertools.islice(waiting, most - len(searches))]
                has_more = len(searches) + len(new) == most
                searches += new
            if not searches:
                return
            rollouts = self.engine.respond([open_search.request() for open_search in searches])
            still_open = []
            for open_search, rollout in zip(searches, rollouts, strict=True):
                if self._tell(open_search, rollout):
                    still_open.append(open_search)
                else:
                    self.engine.forget(open_search.prompt.question)
                    yield open_search.close()
            searches = still_open
            self.after_round(self.simulations)

    def _open(self, prompt: AnyPrompt) -> _OpenSearch:
        own_seed = question_seed(self.seed, prompt.question.id)
        return _OpenSearch(prompt, PathSearch(self.engine.num_blocks, self.settings, own_seed))

    def _tell(self, open_search: _OpenSearch, rollout: Rollout) -> bool:
        """Passes a reward on; returns whether the search continues."""
        search = open_search.search
        is_default = search.base_correct is None
        if is_default or rollout.is_right:
            open_search.responses[search.request] = rollout.response
        simulations = search.simulations
        search.tell(float(rollout.is_right))
        self.simulations += search.simulations - simulations
        if search.request is None:
            return False
        return not is_default or self.is_wanted(open_search.prompt, rollout.is_right)
