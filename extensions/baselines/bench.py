"""The one bench on which methods are compared: questions, the frozen base that answers them, all scores on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path as FilePath

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drllm.errors import UserError
from drllm.files import read_json, write_json
from drllm.provenance import dtype_name, fingerprint
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import Question
from drllm.rollouts.rewards import AnyPrompt, OwnForward, Reward
from drllm.rollouts.routed_paths import routed_paths
from drllm.rollouts.scores import Scores, ScoreStore, score_all
from extensions.baselines.interface import Answered, Tensors
from extensions.baselines.outcomes import Outcome
from train_models.paths import Path, default_path

CHUNK = 64  # questions whose decisions are kept in one file


def by_set(prompts: Sequence[AnyPrompt]) -> dict[str, list[int]]:
    """Set -> places of its questions."""
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt.question.set, []).append(place)
    return places


class Bench:
    """Test questions, training questions, and the outcomes of methods on the former.

    Args:
        routed: a routed model in eval mode, on its device; its frozen base answers.
        tokenizer: tokenizer of the model.
        reward: judges answers.
        questions: training questions, test questions.
        folder: keeps every score; a stopped run scores nothing twice.
        batch_size: questions per forward pass.
        protocol: whether prompts get the chat template, and the format of generated answers.

    Several processes share the work; every process makes the same calls.

    Raises:
        UserError: a question is in `train` and in `test`, or `folder` belongs to another model or protocol.
    """

    def __init__(
        self,
        routed: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reward: Reward,
        questions: tuple[Sequence[Question], Sequence[Question]],
        folder: FilePath,
        batch_size: int,
        protocol: tuple[bool, ResponseFormat] = (False, ResponseFormat()),
    ) -> None:
        train, test = questions
        if shared := {question.id for question in train} & {question.id for question in test}:
            raise UserError(f"{len(shared)} test questions are also training questions, e.g. {sorted(shared)[0]}")
        self.routed = routed
        self.tokenizer = tokenizer
        self.reward = reward
        self.folder = folder
        self.batch_size = batch_size
        self.state = PartialState()
        self.num_blocks: int = routed.config.num_hidden_layers
        chat, response_format = protocol
        self.key = {"model_fingerprint": fingerprint(routed), "dtype": dtype_name(routed.dtype)}
        self.key |= reward.key(chat, response_format)

        def prompt_of(question: Question) -> AnyPrompt:
            return reward.prompt_of(question, tokenizer, chat, response_format)

        self.prompts = [prompt_of(question) for question in test]
        self.training = [Answered.of(prompt_of(question), tokenizer) for question in train]
        self.engine = reward.engine(routed, tokenizer, batch_size, for_search=True)

    @property
    def default(self) -> list[Path]:
        """The default path, once per test question."""
        return [default_path(self.num_blocks)] * len(self.prompts)

    @cached_property
    def base(self) -> Outcome:
        """The unmodified model on the test questions."""
        return self.along(self.default, "base")

    def along(self, paths: Sequence[Path], title: str | None = None) -> Outcome:
        """The outcome of one path per test question; `title` names the progress bar."""
        self.score([[path] for path in paths], title)
        rows = [
            self._test_scores.get(prompt.question.id, path) for prompt, path in zip(self.prompts, paths, strict=True)
        ]
        return self._judged(self.prompts, rows, [float(sum(path)) for path in paths])

    def options_taken(self, path: Path) -> list[int]:
        """The option that `path` ranks first, for each test question; the reward has options, and `score` ran."""
        rows = [self._test_scores.get(prompt.question.id, path) for prompt in self.prompts]
        ranked = [p.values(row, self.reward.normalised) for p, row in zip(self.prompts, rows, strict=True)]
        return [values.index(max(values)) for values in ranked]

    def score(self, paths: Sequence[Sequence[Path]], title: str | None = None) -> None:
        """Scores test question n along `paths[n]`, as far as that is not known; paths that begin alike share blocks."""
        self._score(self._test_scores, self.prompts, paths, title)

    def training_outcomes(self, paths: Sequence[Path], title: str) -> dict[Path, Outcome]:
        """The outcome of each of `paths` on all training questions."""
        prompts = [answered.prompt for answered in self.training]
        store = self._store("training")
        self._score(store, prompts, [paths] * len(prompts), title)
        return {
            path: self._judged(
                prompts, [store.get(prompt.question.id, path) for prompt in prompts], [float(sum(path))] * len(prompts)
            )
            for path in paths
        }

    def training_rewards(self, paths: Sequence[Path], title: str) -> dict[Path, list[float]]:
        """The reward in [0, 1] of each training question along each of `paths`."""
        return {path: outcome.value for path, outcome in self.training_outcomes(paths, title).items()}

    def decisions(self, routed: PreTrainedModel, prompts: Sequence[AnyPrompt], control: float | None = None):
        """The paths that the routers of `routed` decide on, one per prompt; they are kept on disk.

        Args:
            routed: a model with the weights of the bench's base.
            control: the knob of Appendix B; None: as the model has it.
        """
        of_model = routed.model.routing_control
        control = of_model if control is None else control
        digest = hashlib.sha256(str(control).encode())
        for tensor in routed.model.routers.state_dict().values():
            digest.update(tensor.float().cpu().numpy().tobytes())
        chunks = [prompts[start : start + CHUNK] for start in range(0, len(prompts), CHUNK)]
        mine = range(self.state.process_index, len(chunks), self.state.num_processes)
        try:
            routed.model.routing_control = control
            own = {number: self._decided(routed, chunks[number], digest.copy()) for number in mine}
        finally:
            routed.model.routing_control = of_model
        decided = {number: paths for share in gather_object([own]) for number, paths in share.items()}
        return [path for number in range(len(chunks)) for path in decided[number]]

    def with_own_forward(self, name: str, model: OwnForward, fitted: Tensors) -> Outcome:
        """The outcome of a baseline that decides per token; the main process measures it, all processes get it.

        `name` and `fitted` tell it from others.
        """
        digest = hashlib.sha256()
        for key, tensor in sorted(fitted.items()):
            digest.update(key.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        identity = digest.hexdigest()[:16]
        store = self._store(f"{name}-{identity}", baseline=identity)
        waiting = [prompt for prompt in self.prompts if store.get(prompt.question.id, ()) is None]
        waiting.sort(key=lambda prompt: len(prompt.input_ids))  # neighbours need little padding
        starts = range(0, len(waiting), self.batch_size) if self.state.is_main_process else ()
        for start in tqdm(starts, desc=name, unit="batch", mininterval=1):
            part = waiting[start : start + self.batch_size]
            rows = self.reward.judge(model, part, self.tokenizer, self.batch_size)
            store.add((p.question.id, (), (*scores, layers)) for p, (scores, layers) in zip(part, rows, strict=True))
        self.state.wait_for_everyone()
        store.update()
        kept = [store.get(prompt.question.id, ()) for prompt in self.prompts]
        return self._judged(self.prompts, [row[:-1] for row in kept], [row[-1] for row in kept])

    def per_set(self, outcome: Outcome, places: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """`Outcome.summary` and the number of questions of each set.

        Args:
            places: the test questions that `outcome` is of; None: all.
        """
        prompts = self.prompts if places is None else [self.prompts[place] for place in places]
        return {name: outcome.of(own).summary() | {"questions": len(own)} for name, own in by_set(prompts).items()}

    def _store(self, name: str, **key: str) -> ScoreStore:
        return ScoreStore(self.folder / name, self.key | key, self.state.process_index)

    @cached_property
    def _test_scores(self) -> ScoreStore:
        return self._store("test")

    def _score(
        self, store: ScoreStore, prompts: Sequence[AnyPrompt], paths: Sequence[Sequence[Path]], title: str | None
    ) -> None:
        work = list(zip(prompts, paths, strict=True))
        score_all(self.engine, work, store, title, self.state.process_index, self.state.num_processes)
        self.state.wait_for_everyone()
        store.update()

    def _judged(self, prompts: Sequence[AnyPrompt], rows: Sequence[Scores], layers: list[float]) -> Outcome:
        """The outcome of `prompts` whose scores are `rows`."""
        scored = list(zip(prompts, rows, strict=True))
        return Outcome(
            [float(self.reward.is_right(*pair)) for pair in scored],
            layers,
            [self.reward.value(*pair) for pair in scored],
            [float(self.reward.has_answer(*pair)) for pair in scored],
        )

    def _decided(self, routed: PreTrainedModel, prompts: Sequence[AnyPrompt], digest) -> list[Path]:
        for prompt in prompts:
            digest.update(repr(prompt.input_ids).encode())
        file = self.folder / "decisions" / f"{digest.hexdigest()[:20]}.json"
        if not file.exists():
            decided = routed_paths(routed, prompts, self.batch_size)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"paths": ["".join(map(str, member)) for member in decided]})
        return [tuple(map(int, digits)) for digits in read_json(file, "delete it")["paths"]]
