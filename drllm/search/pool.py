"""The searches of many questions side by side, so that their rollouts fill batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from drllm.questions.prompts import Prompt
from drllm.rollouts.engine import Request, Rollout, RolloutEngine
from drllm.search.tree import PathSearch, SearchResult, SearchSettings, question_seed
from train_models.paths import Path


@dataclass(frozen=True)
class SearchedQuestion:
    """A finished search. `result` is that of the default path alone where the search was not wanted."""

    prompt: Prompt
    result: SearchResult
    base_response: str
    path_response: str | None  # along the best path


@dataclass
class _OpenSearch:
    prompt: Prompt
    search: PathSearch
    responses: dict[Path, str] = field(default_factory=dict)  # of right paths, and of the default one

    def close(self) -> SearchedQuestion:
        result = self.search.result()
        best = None if result.best_path is None else self.responses[result.best_path]
        return SearchedQuestion(self.prompt, result, self.responses[self.search.root.path], best)


class SearchPool:
    """Runs the searches of many questions side by side, at most `concurrency` at once.

    A question's result depends on `seed`, its id and the model alone.

    Args:
        is_wanted: asked with (prompt, whether the default path is right) once that is known; where it says no, the
            search of this question ends there.
        after_round: called after each round of rollouts, one for each open search.

    Attributes:
        simulations: walks through all trees so far.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        settings: SearchSettings,
        seed: int,
        concurrency: int,
        is_wanted: Callable[[Prompt, bool], bool] = lambda prompt, base_correct: True,
        after_round: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.seed = seed
        self._batches_at_once = concurrency / engine.batch_size
        self.is_wanted = is_wanted
        self.after_round = after_round
        self.simulations = 0

    def search(self, prompts: Iterable[Prompt]) -> Iterator[SearchedQuestion]:
        """Yields each question as soon as it is finished.

        `prompts` is read only as far as there is room, so that memory does not grow with their number.
        """
        waiting = iter(prompts)
        has_more = True
        searches: list[_OpenSearch] = []
        while True:
            # When batches are halved for lack of memory, fewer questions hold states, too.
            most = max(1, round(self._batches_at_once * self.engine.batch_size))
            # New questions come in groups, because their default paths make batches of their own.
            group = min(self.engine.batch_size, -(-most // 2))
            if has_more and len(searches) <= most - group:
                new = [self._open(prompt) for prompt in itertools.islice(waiting, most - len(searches))]
                has_more = len(searches) + len(new) == most
                searches += new
            if not searches:
                return
            requests = [Request(one.prompt, one.search.request, one.search.base_correct is None) for one in searches]
            rollouts = self.engine.respond(requests)
            still_open = []
            for one, rollout in zip(searches, rollouts, strict=True):
                if self._tell(one, rollout):
                    still_open.append(one)
                else:
                    self.engine.forget(one.prompt.question)
                    yield one.close()
            searches = still_open
            self.after_round()

    def _open(self, prompt: Prompt) -> _OpenSearch:
        own_seed = question_seed(self.seed, prompt.question.id)
        return _OpenSearch(prompt, PathSearch(self.engine.num_blocks, self.settings, own_seed))

    def _tell(self, one: _OpenSearch, rollout: Rollout) -> bool:
        """Whether the search goes on."""
        search = one.search
        is_default = search.base_correct is None
        if is_default or rollout.is_right:
            one.responses[search.request] = rollout.response
        walked = search.simulations
        search.tell(float(rollout.is_right))
        self.simulations += search.simulations - walked
        return search.request is not None and (not is_default or self.is_wanted(one.prompt, rollout.is_right))
