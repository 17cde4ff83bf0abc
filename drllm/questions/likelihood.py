"""Multiple choice by log-likelihood: the prompts of lm-eval's own tasks, and when their metrics count an answer.

The paper grades a generated label. A small or a base model answers those prompts at chance, while its log-likelihoods
of the options rank them well. `likelihood_text` gives the context and the continuations of the lm-eval task that judges
the set, so that a label, a router and a result mean the same:

| set | lm-eval task |
| --- | --- |
| arc_easy, arc_challenge | the same names |
| openbookqa, piqa, hellaswag, truthfulqa_mc1 | the same names |
| siqa | social_iqa |
| commonsense | none: lm-eval's commonsense_qa scores letters; here its options are scored with arc_easy's prompt |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from drllm.errors import UserError
from drllm.questions.sets import SETS, Question

DELIMITER = " "  # lm-eval's target_delimiter

# The question-answer prompt of TruthfulQA's authors, as lm-eval's truthfulqa_mc1 has it.
TRUTHFULQA_EXAMPLES = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain."""


def likelihood_text(question: Question) -> tuple[str, tuple[str, ...]]:
    """(context, continuations) of a multiple-choice question; each continuation begins with lm-eval's delimiter.

    Raises:
        UserError: for sets that are not multiple choice.
    """
    if SETS[question.set].kind != "choice":
        raise UserError(
            f"{question.set} is not multiple choice, so it has no log-likelihood reward; use --reward generation"
        )
    if question.set in ("openbookqa", "hellaswag"):
        context = question.text
    elif question.set == "siqa":
        context = f"Q: {question.context} {question.text}\nA:"
    elif question.set == "truthfulqa_mc1":
        context = f"{TRUTHFULQA_EXAMPLES}\n\nQ: {question.text}\nA:"
    else:
        context = f"Question: {question.text}\nAnswer:"
    return context, tuple(DELIMITER + choice for choice in question.choices)


@dataclass(frozen=True)
class LikelihoodPrompt:
    """A multiple-choice question as a model scores it.

    Attributes:
        text, input_ids: the context, which is all that routers read.
        rows: tokens of context and option together, one row per option.
        scored: number of last tokens in each row that are the option.
        lengths: characters of each option, by which `acc_norm` divides.
        gold: index of the right option.
    """

    question: Question
    text: str
    input_ids: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    scored: tuple[int, ...]
    lengths: tuple[int, ...]
    gold: int

    @classmethod
    def of(cls, question: Question, tokenizer: PreTrainedTokenizerBase) -> LikelihoodPrompt:
        """Tokenised as lm-eval does: context and continuation together, then split at the context's length."""
        context, continuations = likelihood_text(question)
        input_ids = tuple(tokenizer(context)["input_ids"])
        rows = tuple(tuple(tokenizer(context + continuation)["input_ids"]) for continuation in continuations)
        scored = tuple(len(row) - len(input_ids) for row in rows)
        lengths = tuple(len(choice) for choice in question.choices)
        return cls(question, context, input_ids, rows, scored, lengths, question.labels.index(question.answer))

    @property
    def total_tokens(self) -> int:
        """Tokens of the context and the longest option together."""
        return max(map(len, self.rows))

    def is_right(self, log_likelihoods: Sequence[float], normalised: bool) -> bool:
        """Whether the right option alone has the highest summed log-probability: lm-eval's `acc`, ties counted wrong.

        Args:
            log_likelihoods: one per option, in nats.
            normalised: divide each by the characters of its option first (`acc_norm`).
        """
        return self.margin(log_likelihoods, normalised) > 0

    def margin(self, log_likelihoods: Sequence[float], normalised: bool) -> float:
        """The right option's log-likelihood minus that of its best rival, in nats (per character if `normalised`)."""
        values = self.values(log_likelihoods, normalised)
        gold = values.pop(self.gold)
        return gold - max(values)

    def probability(self, log_likelihoods: Sequence[float], normalised: bool) -> float:
        """The right option's share of the likelihood of all options (its logarithm per character if `normalised`)."""
        values = self.values(log_likelihoods, normalised)
        return 1 / sum(math.exp(min(700.0, value - values[self.gold])) for value in values)

    def values(self, log_likelihoods: Sequence[float], normalised: bool) -> list[float]:
        """What options are ranked by: log-likelihoods in nats, per character if `normalised`."""
        if not normalised:
            return list(log_likelihoods)
        return [value / length for value, length in zip(log_likelihoods, self.lengths, strict=True)]
