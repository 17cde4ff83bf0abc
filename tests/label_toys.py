"""Questions with known search results, and label folders made from them."""

import random
from collections.abc import Callable

from drllm import labels
from drllm.manifests import Manifest, begin
from drllm.questions.prompts import Prompt
from drllm.questions.sets import Question
from drllm.search.pool import SearchedQuestion
from drllm.search.progress import Progress, finish
from drllm.search.selection import Selection, seeded_order
from drllm.search.tree import SearchResult

SETS = ("arc_easy", "dart-1")
NUM_BLOCKS = 4
DEFAULT = (1,) * NUM_BLOCKS
KINDS = {
    labels.WRONG_TO_RIGHT: (False, (1, 2, 1, 1)),
    labels.SHORTER: (True, (1, 0, 1, 1)),
    "right": (True, DEFAULT),
    "wrong": (False, None),
}


def question(set_name: str, number: int) -> Question:
    return Question(set_name, f"{set_name}-{number:03d}", f"what is {number}\u2028?", (), (), str(number))


def random_kind(asked: Question) -> str:
    """What a full search of a question finds: a fixed function of its id."""
    return random.Random(asked.id).choice(list(KINDS))


def searched(asked: Question, kind: str | None = None, is_wanted: bool = True) -> SearchedQuestion:
    """A finished question; if it was not wanted, only the default path was evaluated."""
    base_correct, best = KINDS[kind or random_kind(asked)]
    if not is_wanted:
        best = DEFAULT if base_correct else None
    good = () if best in (None, DEFAULT) else (best,)
    simulations = 5 if is_wanted else 0
    result = SearchResult(base_correct, best, good, simulations, inferences=simulations + 1)
    return SearchedQuestion(Prompt(asked, f"Q: {asked.text}", (1, 2), 2), result, "a", None if best is None else "b")


def new_selection(samples: int = 6, count: int = 60, seed: int = 0, share: float = 0.5) -> Selection:
    orders = {name: seeded_order([question(name, n) for n in range(count)], seed) for name in SETS}
    return Selection(orders, dict.fromkeys(SETS, samples), share)


def manifest(**changes) -> Manifest:
    arguments = {"budget": 2.0, "c": 1.8, "samples": {"arc_easy": 6}} | changes.pop("arguments", {})
    model = {"model": "m", "model_fingerprint": "f", "num_layers": NUM_BLOCKS, "dtype": "float32", "commit": "abc"}
    return Manifest(**model | {"arguments": arguments} | changes)


def run(folder, selection, order, rank=0, stop=None):
    """Searches all of `order`, or the first `stop` questions, as a process would."""
    progress = Progress(folder, rank, selection)
    progress.update()
    progress.open()
    for number, asked in enumerate(order):
        if number == stop:
            break
        progress.append(searched(asked))
        progress.update()
    progress.close()
    return progress


def run_in_turns(
    folder,
    new: Callable[[], Selection],
    kind_of: Callable[[Question], str] = random_kind,
    num_processes: int = 1,
    seed: int = 0,
    stop: int | None = None,
    share_read: float = 0.3,
) -> Progress | None:
    """A run of several processes whose questions finish in random order and become known to the others late.

    `share_read`: how often a process reads what the others have finished.

    Returns the main process's progress, or None if the run was stopped after `stop` questions.
    """
    choose = random.Random(seed)
    progresses = [Progress(folder, rank, new()) for rank in range(num_processes)]
    for progress in progresses:
        progress.update()
        progress.open()
    main = progresses[0].selection
    finished = 0
    while not (stage := main.next_stage()).is_last:
        orders = {}
        for rank, progress in enumerate(progresses):
            progress.selection.quotas = stage.quotas
            orders[rank] = progress.selection.remaining(rank, num_processes, stage.searched)
        while orders and finished != stop:
            rank = choose.choice(list(orders))
            asked = next(orders[rank], None)
            if asked is None:
                del orders[rank]
                continue
            selection = progresses[rank].selection
            kind = labels.SHORTER if KINDS[kind_of(asked)][0] else labels.WRONG_TO_RIGHT
            progresses[rank].append(searched(asked, kind_of(asked), selection.is_wanted(asked, kind)))
            finished += 1
            if choose.random() < share_read:
                progresses[rank].update()
        if finished == stop:
            break
        for progress in progresses:
            progress.update()
    main.quotas = stage.quotas
    for progress in progresses:
        progress.close()
    return progresses[0] if stage.is_last else None


def make_finished(folder):
    """A folder of finished labels."""
    finish(folder, begin(folder, manifest()), run_in_turns(folder, new_selection))
    return folder
