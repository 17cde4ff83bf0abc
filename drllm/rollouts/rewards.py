"""What counts as a right answer: a graded response, as published, or the log-likelihoods of a question's options.

A reward turns questions into prompts, runs them with its engine, and judges the row of numbers that the engine leaves
per question and path. Nothing else asks which reward it is.

    generation       greedy response, graded (the paper's)
    likelihood       the right option of a multiple-choice question is the most probable one (lm-eval's acc)
    likelihood_norm  the same with log-likelihoods per character (lm-eval's acc_norm)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drllm.errors import UserError
from drllm.files import shorten
from drllm.questions.grading import GRADER_VERSION
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.questions.prompts import Prompt, wants_chat_template
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import SETS, Question
from drllm.rollouts.batches import BatchSize
from drllm.rollouts.engine import Rollout, RolloutEngine
from drllm.rollouts.likelihood import LikelihoodEngine, choice_of
from drllm.rollouts.scores import Scores


class OwnForward(Protocol):
    """A model with a forward pass of its own: it decides per token, so no path describes it."""

    def score(self, prompts: Sequence[LikelihoodPrompt], batch_size: int) -> list[tuple[Scores, float]]:
        """Per prompt (summed log-probabilities of the options in nats, block applications per token)."""

    def answer(self, prompts: Sequence[Prompt], tokenizer, batch_size: int) -> list[tuple[Scores, float]]:
        """Per prompt (`Rollout.scores` of the greedy answer, block applications per token)."""


@dataclass(frozen=True)
class Generation:
    """The response is generated greedily and graded."""

    name = "generation"
    metric = "acc,none"
    has_options = False
    generates = True

    def check_sets(self, sets: Sequence[str]) -> None:
        """Accepts every set."""

    def check_format(self, chat_template: str, inject_boxed: bool, strict_letters: bool) -> None:
        """Raises UserError when the arguments of prompts and responses contradict each other."""
        if inject_boxed and chat_template == "on":
            raise UserError(
                "--inject_boxed is for base models, whose prompts have no chat template; use --chat_template off"
            )

    def uses_chat_template(
        self, setting: str, model: str, tokenizer: PreTrainedTokenizerBase, stop_ids: int | list[int] | None
    ) -> tuple[bool, str]:
        """Whether prompts get the chat template, and why: see `wants_chat_template`."""
        return wants_chat_template(setting, model, tokenizer, stop_ids)

    def prompt_of(
        self, question: Question, tokenizer, chat: bool = False, response_format: ResponseFormat | None = None
    ) -> Prompt:
        """The question as the model receives it."""
        return Prompt.of(question, tokenizer, chat, response_format)

    def size(self, prompt: Prompt) -> tuple[int, int]:
        """(tokens, places whose logits are computed), for `drllm.rollouts.batches`."""
        return prompt.total_tokens, 1

    def engine(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: BatchSize,
        for_search: bool = False,
    ) -> RolloutEngine:
        """Answers prompts along paths.

        Args:
            for_search: many paths of one question follow each other, so the states of its default path are kept until
                `forget`.
        """
        return RolloutEngine(model, tokenizer, batch_size, reuse_default_states=for_search)

    def key(self, chat: bool, response_format: ResponseFormat) -> dict[str, Any]:
        """What scores depend on besides the model, as JSON."""
        return {
            "reward": self.name,
            "chat_template": chat,
            "response_format": response_format.as_dict(),
            "grader_version": GRADER_VERSION,
        }

    def is_right(self, prompt: Prompt, scores: Scores) -> bool:
        """Whether the response was right."""
        return scores[0] == 1

    def rollout(self, prompt: Prompt, scores: Scores) -> Rollout | None:
        """None: the response is not kept, so it has to be generated again."""
        return None

    def value(self, prompt: Prompt, scores: Scores) -> float:
        """1 for a right response, 0 for a wrong one."""
        return scores[0]

    def has_answer(self, prompt: Prompt, scores: Scores) -> bool:
        """Whether the response held an answer to grade; False counts as wrong."""
        return scores[1] == 1

    def judge(
        self, model: OwnForward, prompts: Sequence[Prompt], tokenizer, batch_size: int
    ) -> list[tuple[Scores, float]]:
        """Per prompt (scores, block applications per token) under a forward pass of its own."""
        return model.answer(prompts, tokenizer, batch_size)


@dataclass(frozen=True)
class Likelihood:
    """The right option must be the most probable one; no chat template, as in lm-eval's tasks.

    normalised: log-likelihoods are divided by the characters of their options (`acc_norm`).
    """

    normalised: bool = False
    has_options = True
    generates = False

    @property
    def metric(self) -> str:
        """The metric of lm-eval's tasks that judges the same."""
        return "acc_norm,none" if self.normalised else "acc,none"

    @property
    def name(self) -> str:
        """As the command line spells it."""
        return "likelihood_norm" if self.normalised else "likelihood"

    def check_sets(self, sets: Sequence[str]) -> None:
        """Raises UserError when a set is not multiple choice."""
        if others := [name for name in sets if SETS[name].kind != "choice"]:
            raise UserError(f"{others[0]} is not multiple choice, so --reward {self.name} cannot judge it")

    def check_format(self, chat_template: str, inject_boxed: bool, strict_letters: bool) -> None:
        """Raises UserError when an argument shapes prompts or responses, which are those of lm-eval."""
        for name, given in (("inject_boxed", inject_boxed), ("strict_letters", strict_letters)):
            if given:
                raise UserError(f"--{name} shapes responses, but --reward {self.name} generates none; omit it")
        if chat_template == "on":
            raise UserError(f"--reward {self.name} uses lm-eval's prompts, which have no chat template; omit it")

    def uses_chat_template(
        self, setting: str, model: str, tokenizer: PreTrainedTokenizerBase, stop_ids: int | list[int] | None
    ) -> tuple[bool, str]:
        """Never; UserError where it is wanted all the same."""
        self.check_format(setting, inject_boxed=False, strict_letters=False)
        return False, "lm-eval's prompts have none"

    def prompt_of(
        self, question: Question, tokenizer, chat: bool = False, response_format: ResponseFormat | None = None
    ) -> LikelihoodPrompt:
        """The question as the model scores it."""
        return LikelihoodPrompt.of(question, tokenizer)

    def size(self, prompt: LikelihoodPrompt) -> tuple[int, int]:
        """(tokens, places whose logits are computed): the context, then all options."""
        scored = sum(prompt.scored)
        return len(prompt.input_ids) + scored, scored

    def engine(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: BatchSize,
        for_search: bool = False,
    ) -> LikelihoodEngine:
        """Scores options along paths; keeps the states that fit into its memory in any case."""
        return LikelihoodEngine(model, tokenizer, batch_size, self.normalised)

    def key(self, chat: bool, response_format: ResponseFormat) -> dict[str, Any]:
        """Nothing: log-likelihoods depend on the model alone."""
        return {}

    def is_right(self, prompt: LikelihoodPrompt, scores: Scores) -> bool:
        """Whether the right option alone has the highest score."""
        return prompt.is_right(scores, self.normalised)

    def rollout(self, prompt: LikelihoodPrompt, scores: Scores) -> Rollout | None:
        """What the engine's `respond` says, from its scores."""
        return choice_of(prompt, scores, self.normalised)

    def value(self, prompt: LikelihoodPrompt, scores: Scores) -> float:
        """The probability of the right option among the options."""
        return prompt.probability(scores, self.normalised)

    def has_answer(self, prompt: LikelihoodPrompt, scores: Scores) -> bool:
        """Always: one of the options is the most probable one."""
        return True

    def judge(
        self, model: OwnForward, prompts: Sequence[LikelihoodPrompt], tokenizer, batch_size: int
    ) -> list[tuple[Scores, float]]:
        """See `Generation.judge`."""
        return model.score(prompts, batch_size)


Reward = Generation | Likelihood
AnyPrompt = Prompt | LikelihoodPrompt
AnyEngine = RolloutEngine | LikelihoodEngine
PUBLISHED = Generation.name  # the reward of labels whose manifest names none
_REWARDS: dict[str, Reward] = {reward.name: reward for reward in (Generation(), Likelihood(), Likelihood(True))}
REWARDS = tuple(_REWARDS)
HELP = (
    "generation: the response is graded, as published; likelihood: the right option of "
    "a multiple-choice question is the most probable one, as in lm-eval's acc (_norm: acc_norm)"
)


def reward_named(name: str) -> Reward:
    """The reward of that name.

    Raises:
        UserError: it is not one of `REWARDS`.
    """
    if name not in _REWARDS:
        raise UserError(f"'reward' is {shorten(name)}, not one of {', '.join(REWARDS)}")
    return _REWARDS[name]
