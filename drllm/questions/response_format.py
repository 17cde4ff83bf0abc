"""How responses are limited, seeded and graded: the same in search and evaluation, so it is recorded with labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from drllm.errors import UserError
from drllm.questions.grading import can_still_be_right, grade, has_answer
from drllm.questions.response_text import has_settled_box
from drllm.questions.sets import SETS, Question

BOX = r"\boxed{"
STRICT_LETTERS, STRICT_PREFIX = ("A", "B", "C", "D"), "Answer:"


@dataclass(frozen=True)
class ResponseFormat:
    """The response format of a run; the default is ours, the options are the paper's Appendix A for base models.

    Attributes:
        max_new_tokens: set -> most new tokens of a response; sets that are missing have the limit of `SETS`.
        inject_boxed: math prompts end with "\\boxed{", which belongs to the response when it is graded.
        strict_letters: a multiple-choice response must begin with one of the letters A to D, standing alone, after an
            optional "Answer:". Items whose answer is another label (E, or 1 to 4) are then always wrong.
    """

    max_new_tokens: Mapping[str, int] = field(default_factory=dict)
    inject_boxed: bool = False
    strict_letters: bool = False

    @classmethod
    def of_dict(cls, recorded: Mapping[str, Any]) -> ResponseFormat:
        """The inverse of `as_dict`: the default for what the arguments of a manifest lack; others are ignored.

        Raises:
            UserError: a field of another type, or a set that does not exist.
        """
        fields = {name: recorded[name] for name in cls.__dataclass_fields__ if name in recorded}
        limits = fields.get("max_new_tokens", {})
        if not isinstance(limits, Mapping) or not all(
            name in SETS and type(limit) is int and limit > 0 for name, limit in limits.items()
        ):
            raise UserError("'max_new_tokens' does not give a positive integer for each question set")
        for name in ("inject_boxed", "strict_letters"):
            if not isinstance(fields.get(name, False), bool):
                raise UserError(f"{name!r} is not true or false")
        return cls(**fields)

    def without_defaults(self, chat: bool) -> ResponseFormat:
        """The same format without the limits that are the default, with a chat template or without one."""
        default = ResponseFormat()
        limits = {name: limit for name, limit in self.max_new_tokens.items() if limit != default.limit(name, chat)}
        return replace(self, max_new_tokens=limits)

    def describe(self) -> str:
        """What differs from the default, in words; empty for the default."""
        parts = [f"{name} at most {limit} new tokens" for name, limit in sorted(self.max_new_tokens.items())]
        parts += ["math prompts end with \\boxed{"] if self.inject_boxed else []
        parts += ["only a leading A, B, C or D is an answer"] if self.strict_letters else []
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The form in which a manifest records it, under "arguments"."""
        return asdict(self)

    def limit(self, question: Question | str, chat: bool) -> int:
        """Most new tokens of a response to a question, or to the questions of a set."""
        name = question if isinstance(question, str) else question.set
        return self.max_new_tokens.get(name, SETS[name].max_new_tokens[1 if chat else 0])

    def seed(self, question: Question) -> str:
        """The start of the response that is part of the prompt; empty for most."""
        return BOX if self.inject_boxed and SETS[question.set].kind == "math" else ""

    def grade(self, question: Question, response: str) -> bool:
        """Whether `response`, the text after prompt and seed, is right."""
        if self._is_strict(question):
            return _strict_letter(response) == question.answer
        return grade(question, self.seed(question) + response)

    def has_answer(self, question: Question, response: str) -> bool:
        """Whether `response` holds an answer to grade, right or wrong; see `grading.has_answer`."""
        if self._is_strict(question):
            return _strict_letter(response) is not None
        return has_answer(question, self.seed(question) + response)

    def is_settled(self, question: Question, partial: str) -> bool:
        """Whether `grade` and `has_answer` are the same for every continuation of the partial response."""
        if self._is_strict(question):
            text = partial.lstrip()
            if STRICT_PREFIX.startswith(text):  # nothing, or an A that may become "Answer:"
                return False
            text = text.removeprefix(STRICT_PREFIX).lstrip()
            return len(text) > 1 or (bool(text) and text not in STRICT_LETTERS)
        text = self.seed(question) + partial
        # The first closed box decides, whether it is right or wrong.
        is_boxed = SETS[question.set].kind == "math" and has_settled_box(text)
        return is_boxed or not can_still_be_right(question, text)

    def _is_strict(self, question: Question) -> bool:
        return self.strict_letters and SETS[question.set].kind == "choice"


def _strict_letter(response: str) -> str | None:
    """The letter A to D with which a response begins, standing alone, after an optional "Answer:"; None without one."""
    text = response.lstrip().removeprefix(STRICT_PREFIX).lstrip()
    return text[0] if text[:1] in STRICT_LETTERS and not text[1:2].isalnum() else None
