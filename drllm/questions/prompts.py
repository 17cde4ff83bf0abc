"""How a question is asked: its text, the chat template, its tokens, and how long the response may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from drllm.errors import UserError
from drllm.questions.sets import SETS, Question


def render_prompt(question: Question) -> str:
    """The prompt of a question, before any chat template."""
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


# Llama-3.2's template writes today's date into every prompt, where nothing else is given; this is Llama-3.1's date.
TEMPLATE_ARGUMENTS = {"date_string": "26 Jul 2024"}


def wants_chat_template(setting: str, name: str, tokenizer: Any) -> bool:
    """Whether prompts get the chat template. Base models may carry one too, so "auto" goes by the model's name.

    Raises:
        UserError: "on" where the tokenizer has no template.
    """
    if setting == "auto":
        return bool(tokenizer.chat_template) and "instruct" in name.lower()
    if setting == "on" and not tokenizer.chat_template:
        raise UserError(f"--chat_template on: the tokenizer of {name} has none; use off")
    return setting == "on"


def apply_template(prompt: str, tokenizer: Any, chat: bool) -> str:
    """`prompt` as the model is given it: itself, or as the user's turn of the tokenizer's chat template.

    The text is tokenised with `add_special_tokens=not chat`: a chat template brings its own first token.
    """
    if not chat:
        return prompt
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: run without the chat template"
        )
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, **TEMPLATE_ARGUMENTS
    )


def adds_special_tokens(text: str, tokenizer: Any) -> bool:
    """Whether `text` is tokenised with special tokens, by lm-eval's rule: unless it begins with its own BOS."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def response_limit(question: Question | str, chat: bool) -> int:
    """Most new tokens of a response to a question or a set: ARC 2 for base models, 10 with chat; DART 15."""
    spec = SETS[question if isinstance(question, str) else question.set]
    return spec.max_new_tokens[1 if chat else 0]


@dataclass(frozen=True)
class Prompt:
    """A question as a model is given it: `text`, its tokens, and how many tokens a response may have."""

    question: Question
    text: str
    input_ids: tuple[int, ...]
    max_new_tokens: int

    @classmethod
    def of(cls, question: Question, tokenizer: PreTrainedTokenizerBase, chat: bool) -> Prompt:
        text = apply_template(render_prompt(question), tokenizer, chat)
        input_ids = tokenizer(text, add_special_tokens=adds_special_tokens(text, tokenizer))["input_ids"]
        return cls(question, text, tuple(input_ids), response_limit(question, chat))
