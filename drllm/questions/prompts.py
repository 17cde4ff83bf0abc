"""The prompt of a question: its text, the chat template, its tokens, and the limit of the response."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from drllm.errors import UserError
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import SETS, Question


def render_prompt(question: Question, response_format: ResponseFormat | None = None) -> str:
    """The prompt of a question before any chat template, with the seed of the response if the format has one."""
    seed = response_format.seed(question) if response_format else ""
    return f"{_render(question)} {seed}" if seed else _render(question)


def _render(question: Question) -> str:
    kind = SETS[question.set].kind
    if kind == "choice":
        options = "".join(
            f"{label}. {choice}\n" for label, choice in zip(question.labels, question.choices, strict=True)
        )
        return f"Question: {question.text}\n{options}Answer with the label of the correct option only.\nAnswer:"
    if kind == "math":
        return f"Problem: {question.text}\nGive only the final answer, as \\boxed{{answer}}.\nAnswer:"
    return (
        f"Passage: {question.context}\nQuestion: {question.text}\n"
        "Answer with a span of the passage, or with unanswerable.\nAnswer:"
    )


# Llama-3.2's template writes today's date into every prompt unless a date is given; this one is Llama-3.1's default.
TEMPLATE_ARGUMENTS = {"date_string": "26 Jul 2024"}
# Answers are direct: a template with this switch (Qwen3's) would have the model think, and the limit would cut it off.
NO_THINKING = {"enable_thinking": False}


def thinking_switch(tokenizer: Any, chat: bool) -> dict[str, bool]:
    """What a manifest records of the template's switch: `NO_THINKING`, or nothing where prompts have no such switch."""
    return NO_THINKING if chat and "enable_thinking" in str(tokenizer.chat_template) else {}


def wants_chat_template(setting: str, name: str, tokenizer: Any, stop_ids: int | list[int] | None) -> tuple[bool, str]:
    """Whether prompts get the chat template, and the reason in words.

    Base models may carry a template too. They do not stop at the end of a turn: that tells them apart.

    Args:
        setting: "on", "off" or "auto".
        name: name of the model.
        tokenizer: tokenizer of the model.
        stop_ids: tokens at which the model stops (`eos_token_id` of its generation config).

    Raises:
        UserError: "on", but the tokenizer has no template.
    """
    if setting != "auto":
        if setting == "on" and not tokenizer.chat_template:
            raise UserError(f"--chat_template on: the tokenizer of {name} has none; use off")
        return setting == "on", f"--chat_template {setting}"
    if not tokenizer.chat_template:
        return False, "its tokenizer has none"
    stops = set(stop_ids if isinstance(stop_ids, list) else [stop_ids])
    if (end := _end_of_turn(tokenizer)) is not None and end in stops:
        return True, f"the model stops at the end of a turn, {tokenizer.convert_ids_to_tokens(end)}"
    if "instruct" in name.lower():
        return True, "its name says instruct"
    return False, "its tokenizer has one, but the model does not stop at the end of a turn, like a base model"


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token with which the template ends a turn of the assistant; None where it has none."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **TEMPLATE_ARGUMENTS)
    except (TemplateError, TypeError, ValueError):  # a template for other conversations
        return None
    after = tokenizer(text.rpartition("answer")[2], add_special_tokens=False)["input_ids"]
    return next((token for token in after if token in tokenizer.all_special_ids), None)


def apply_template(prompt: str, tokenizer: Any, chat: bool) -> str:
    """`prompt` as the model receives it: unchanged, or as the user's turn of the tokenizer's chat template.

    Raises:
        UserError: `chat`, but the tokenizer has no template.
    """
    if not chat:
        return prompt
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: run without the chat template"
        )
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        **TEMPLATE_ARGUMENTS,
        **NO_THINKING,
    )


def adds_special_tokens(text: str, tokenizer: Any) -> bool:
    """Whether to tokenise `text` with special tokens; as in lm-eval, unless it already begins with BOS."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


@dataclass(frozen=True)
class Prompt:
    """A question as the model receives it.

    Attributes:
        question: what is asked.
        text, input_ids: the prompt, and its tokens.
        max_new_tokens: most tokens of the response.
        response_format: how the response is graded.
    """

    question: Question
    text: str
    input_ids: tuple[int, ...]
    max_new_tokens: int
    response_format: ResponseFormat = field(default_factory=ResponseFormat, compare=False, repr=False)

    @property
    def total_tokens(self) -> int:
        """Most tokens of prompt and response together."""
        return len(self.input_ids) + self.max_new_tokens

    @classmethod
    def of(
        cls,
        question: Question,
        tokenizer: PreTrainedTokenizerBase,
        chat: bool,
        response_format: ResponseFormat | None = None,
    ) -> Prompt:
        """The prompt of `question`, with the chat template if `chat`."""
        response_format = response_format or ResponseFormat()
        text = apply_template(render_prompt(question, response_format), tokenizer, chat)
        input_ids = tokenizer(text, add_special_tokens=adds_special_tokens(text, tokenizer))["input_ids"]
        return cls(question, text, tuple(input_ids), response_format.limit(question, chat), response_format)
