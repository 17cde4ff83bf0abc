"""Test questions on which rivals are compared, by log-likelihood or by generation. Every score is kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drllm.errors import UserError
from drllm.evaluation.outcomes import Outcome, answer_along
from drllm.group_paths.likelihood_rewards import LikelihoodRewards
from drllm.group_paths.margin_rewards import Answered
from drllm.provenance import dtype_name, fingerprint
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.questions.prompts import Prompt
from drllm.questions.sets import Question
from drllm.rivals.cola import CoLa
from drllm.rivals.interface import AnyPrompt, FittedRival, TokenLevelRival
from drllm.rollouts.engine import RolloutEngine
from drllm.rollouts.likelihood import LikelihoodEngine
from drllm.rollouts.scores import Scores, ScoreStore
from train_models.paths import Path


class RewardBench:
    """What both kinds of reward share.

    Args:
        routed: a routed model in eval mode, on its device; its frozen base answers.
        tokenizer: of the model.
        train, test: questions.
        folder: keeps every score; a stopped run scores nothing twice.
        batch_size: questions per forward pass.

    Raises:
        UserError: a question is in `train` and in `test`, or `folder` belongs to another model.
    """

    reward: str

    def __init__(
        self,
        routed: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Question],
        test: Sequence[Question],
        folder: FilePath,
        batch_size: int,
    ) -> None:
        shared = {question.id for question in train} & {question.id for question in test}
        if shared:
            raise UserError(f"{len(shared)} test questions are also training questions, e.g. {sorted(shared)[0]}")
        self.routed = routed
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.folder = folder
        self.key = {"model_fingerprint": fingerprint(routed), "dtype": dtype_name(routed.dtype)}
        self.prompts = [self.prompt(question) for question in test]
        self.training = [self.answered(self.prompt(question)) for question in train]

    def prompt(self, question: Question) -> AnyPrompt:
        """The question as the model receives it."""
        raise NotImplementedError

    def answered(self, prompt: AnyPrompt) -> Answered:
        """A training prompt with the tokens of its gold answer."""
        raise NotImplementedError

    def engine(self) -> RolloutEngine | LikelihoodEngine:
        """Answers along paths, for a search."""
        raise NotImplementedError

    def along(self, name: str, paths: Sequence[Path]) -> Outcome:
        """The outcome of one path per test question; `name` is the title of the progress bar."""
        raise NotImplementedError

    def judge(self, rival: TokenLevelRival, prompts: Sequence[AnyPrompt]) -> list[Scores]:
        """Per prompt what a rival's own forward pass leaves: scores, then block applications per token."""
        raise NotImplementedError

    def is_right(self, prompt: AnyPrompt, scores: Scores) -> bool:
        """Whether the scores that `judge` left are those of a right answer."""
        raise NotImplementedError

    def with_own_forward(self, rival: FittedRival) -> Outcome:
        """The outcome of a rival that decides per token."""
        digest = hashlib.sha256()
        for name, tensor in sorted(rival.tensors().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        key = self.key | {"reward": self.reward, "rival": digest.hexdigest()[:16]}
        store = ScoreStore(self.folder / f"{rival.name}-{key['rival']}", key)
        work = [(prompt, ()) for prompt in self.prompts]
        self._keep(store, work, lambda part: self.judge(rival, [prompt for prompt, _ in part]), rival.name)
        kept = [store.get(prompt.question.id, ()) for prompt in self.prompts]
        right = [float(self.is_right(*pair)) for pair in zip(self.prompts, kept, strict=True)]
        return Outcome(right, [scores[-1] for scores in kept])

    def ceiling(self, cola: CoLa, prompts: Sequence[AnyPrompt], seed: int) -> Outcome:
        """The outcome of a search with the gold answers of `prompts`."""
        digest = hashlib.sha256(f"{cola.search} {seed}".encode()).hexdigest()[:8]
        key = self.key | {"reward": self.reward, "search": str(cola.search), "seed": seed}
        return cola.outcome(self.engine(), prompts, ScoreStore(self.folder / f"cola-{digest}", key), seed)

    def _keep(
        self,
        store: ScoreStore,
        work: Sequence[tuple[AnyPrompt, Path]],
        judge: Callable[[Sequence[tuple[AnyPrompt, Path]]], list[Scores]],
        title: str,
    ) -> None:
        """Judges the (prompt, path) pairs of `work` that `store` does not hold."""
        waiting = [pair for pair in work if store.get(pair[0].question.id, pair[1]) is None]
        waiting.sort(key=lambda pair: len(pair[0].input_ids))  # neighbours need little padding
        with tqdm(total=len(waiting), desc=title, unit="question", mininterval=1) as progress:
            for start in range(0, len(waiting), self.batch_size):
                part = waiting[start : start + self.batch_size]
                rows = judge(part)
                store.add((prompt.question.id, path, row) for (prompt, path), row in zip(part, rows, strict=True))
                progress.update(len(part))


class LikelihoodBench(RewardBench):
    """Multiple choice, judged by lm-eval's `acc`. Scores along paths are kept as compare_likelihood does."""

    reward = "likelihood"

    def prompt(self, question: Question) -> LikelihoodPrompt:
        """See `RewardBench.prompt`."""
        return LikelihoodPrompt.of(question, self.tokenizer)

    def answered(self, prompt: LikelihoodPrompt) -> Answered:
        """See `RewardBench.answered`."""
        return Answered(prompt, prompt.rows[prompt.gold][-prompt.scored[prompt.gold] :])

    def engine(self) -> LikelihoodEngine:
        """See `RewardBench.engine`."""
        return LikelihoodEngine(self.routed, self.tokenizer, self.batch_size)

    def along(self, name: str, paths: Sequence[Path]) -> Outcome:
        """See `RewardBench.along`."""
        store = ScoreStore(self.folder / "test", self.key)
        rewards = LikelihoodRewards(self.routed, self.prompts, store, PartialState(), self.batch_size)
        rewards.score([[path] for path in paths], name)
        right = [float(rewards.is_right(*pair)) for pair in zip(self.prompts, paths, strict=True)]
        return Outcome(right, [float(sum(path)) for path in paths])

    def judge(self, rival: TokenLevelRival, prompts: Sequence[LikelihoodPrompt]) -> list[Scores]:
        """See `RewardBench.judge`."""
        return [(*scores, layers) for scores, layers in rival.score(prompts, self.batch_size)]

    def is_right(self, prompt: LikelihoodPrompt, scores: Scores) -> bool:
        """See `RewardBench.is_right`."""
        return prompt.is_right(scores[:-1], normalised=False)


class GenerationBench(RewardBench):
    """Greedy answers, graded as in the search. Prompts have no chat template."""

    reward = "generation"

    def prompt(self, question: Question) -> Prompt:
        """See `RewardBench.prompt`."""
        return Prompt.of(question, self.tokenizer, chat=False)

    def answered(self, prompt: Prompt) -> Answered:
        """See `RewardBench.answered`."""
        return Answered.of(prompt, self.tokenizer)

    def engine(self) -> RolloutEngine:
        """See `RewardBench.engine`."""
        return RolloutEngine(self.routed, self.tokenizer, self.batch_size, reuse_default_states=False)

    def along(self, name: str, paths: Sequence[Path]) -> Outcome:
        """See `RewardBench.along`."""
        store = ScoreStore(self.folder / "test", self.key | {"reward": self.reward})
        return answer_along(self.engine(), self.prompts, paths, store, name)

    def judge(self, rival: TokenLevelRival, prompts: Sequence[Prompt]) -> list[Scores]:
        """See `RewardBench.judge`."""
        return [
            (float(is_right), layers) for is_right, layers in rival.answer(prompts, self.tokenizer, self.batch_size)
        ]

    def is_right(self, prompt: Prompt, scores: Scores) -> bool:
        """See `RewardBench.is_right`."""
        return scores[0] == 1


BENCHES: dict[str, type[RewardBench]] = {bench.reward: bench for bench in (LikelihoodBench, GenerationBench)}
