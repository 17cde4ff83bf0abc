"""Which settings each evaluation task gets: chat template, generation limits, and the default tasks of a checkpoint.

* In-domain tasks (`drllm_arc`, `drllm_dart`, ...) repeat what the labels were made with: their chat template and
  response format (limits on new tokens, start of the response, grading), which `--gen_kwargs` does not change.
* Log-likelihood tasks of the label sets (`drllm_ll_*`) have lm-eval's own prompts, without a chat template.
* All other tasks run with lm-eval's defaults: no chat template unless it is requested, and the task's own generation
  settings unless `--gen_kwargs` overrides them (the paper's Section 5: at most 2,048 tokens).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drllm.errors import UserError
from drllm.manifests import CHECKPOINT_MANIFEST, COPY_AGAIN, read_checkpoint_manifests
from drllm.questions.response_format import ResponseFormat
from drllm.rollouts.rewards import PUBLISHED, Reward, reward_named

GENERATION_TASKS = "drllm_arc,drllm_dart"
LIKELIHOOD_PREFIX = "drllm_ll_"
# Names of the authors' README -> task, and why it is not lm-eval's own of that name.
AUTHORS_TASKS = {
    "dart": ("drllm_dart", "lm-eval has no such task"),
    "gpqa_diamond": ("gpqa_diamond_zeroshot", "lm-eval has it per number of shots"),
    "truthfulqa": ("truthfulqa_mc1", "in lm-eval a tag of three tasks"),
}
# Names for the limit on new tokens; lm-eval 0.4.13 prefers the first, which its tasks use, to the paper's spelling.
LIMIT_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


# --------------------------------------------------------------------------------------------------------
# What the labels of a checkpoint say


def uses_chat_template(setting: str, checkpoint: Path) -> bool:
    """Whether in-domain prompts have the chat template ("auto": as the labels of the checkpoint were made)."""
    if setting != "auto":
        return setting == "on"
    return any(manifest.chat_template for manifest in read_checkpoint_manifests(checkpoint))


def may_think(checkpoint: Path) -> bool:
    """Whether in-domain prompts with a chat template let the model think: labels of a template that were made so."""
    templated = [manifest for manifest in read_checkpoint_manifests(checkpoint) if manifest.chat_template]
    return any(manifest.arguments.get("enable_thinking", True) for manifest in templated)


def response_format_of(checkpoint: Path) -> ResponseFormat:
    """The response format that the labels of a checkpoint were made with, without limits that are the default.

    Raises:
        UserError: a damaged manifest, or labels of several formats.
    """
    formats = []
    for manifest in read_checkpoint_manifests(checkpoint):
        try:
            formats.append(manifest.response_format)
        except UserError as error:
            raise UserError(f"{checkpoint / CHECKPOINT_MANIFEST}: {error}; {COPY_AGAIN}") from None
    if any(other != formats[0] for other in formats[1:]):
        texts = " and ".join(dict.fromkeys(part.describe() or "the default" for part in formats))
        file = checkpoint / CHECKPOINT_MANIFEST
        raise UserError(f"{file}: labels of several response formats ({texts}); train on those of one")
    return formats[0] if formats else ResponseFormat()


def reward_of(checkpoint: Path) -> Reward:
    """The reward that the labels of a checkpoint were searched with; labels without a record have the paper's.

    Raises:
        UserError: labels of several rewards.
    """
    names = {manifest.reward for manifest in read_checkpoint_manifests(checkpoint)} or {PUBLISHED}
    if len(names) > 1:
        raise UserError(
            f"{checkpoint / CHECKPOINT_MANIFEST}: labels of several rewards ({', '.join(sorted(names))}); train anew"
        )
    return reward_named(names.pop())


def default_tasks(checkpoint: Path) -> str:
    """The tasks that a checkpoint was trained for: those of its reward, on the sets of its labels.

    Raises:
        UserError: labels with a likelihood reward that do not name their sets.
    """
    if reward_of(checkpoint).generates:
        return GENERATION_TASKS
    sets: list[str] = []
    for manifest in read_checkpoint_manifests(checkpoint):
        names = manifest.arguments.get("dataset")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{checkpoint / CHECKPOINT_MANIFEST}: 'arguments.dataset' names no sets; pass --tasks")
        sets += names
    return ",".join(LIKELIHOOD_PREFIX + name for name in dict.fromkeys(sets))


def reward_warning(checkpoint: Path, tasks: str) -> str | None:
    """One sentence when in-domain `tasks` judge another reward than the checkpoint was trained for, else None."""
    reward = reward_of(checkpoint)
    for task in filter(is_in_domain, tasks.split(",")):
        if is_likelihood(task) != reward.has_options:
            kind = "log-likelihoods of options" if is_likelihood(task) else "generated answers"
            return (
                f"warning: {checkpoint} was trained with --reward {reward.name}, but {task} judges {kind}; the tasks "
                f"of its reward are {default_tasks(checkpoint)}"
            )
    return None


# --------------------------------------------------------------------------------------------------------
# Tasks


def is_in_domain(task: str) -> bool:
    """Whether `task` is one of ours: the sets and the reward of the labels."""
    return task.startswith("drllm_")


def authors_tasks(tasks: str) -> tuple[str, list[str]]:
    """Comma-separated tasks with the names of the authors' README replaced, and a sentence for each of these."""
    names = tasks.split(",")
    said = [f"{name}: {AUTHORS_TASKS[name][0]} ({AUTHORS_TASKS[name][1]})" for name in names if name in AUTHORS_TASKS]
    return ",".join(AUTHORS_TASKS.get(name, (name,))[0] for name in names), said


def is_likelihood(task: str) -> bool:
    """Whether `task` scores the options of a label set by log-likelihood."""
    return task.startswith(LIKELIHOOD_PREFIX)


def is_graded_here(task: str) -> bool:
    """Whether the responses to `task` are graded by `drllm.questions.grading`, as in the search."""
    return is_in_domain(task) and not is_likelihood(task)


@dataclass(frozen=True)
class Part:
    """Tasks with the same settings: one run of lm-eval.

    Attributes:
        tasks: comma-separated.
        chat_template: whether prompts have the model's chat template.
        gen_kwargs: overrides the tasks' generation settings; None keeps them.
        response_format: format of in-domain responses, as JSON (`ResponseFormat.as_dict`); None: the default.
        enable_thinking: switch of the chat template, where it has one; None: its default.
    """

    tasks: str
    chat_template: bool
    gen_kwargs: str | None
    response_format: str | None = None
    enable_thinking: bool | None = None

    @property
    def record(self) -> dict[str, Any]:
        """The part as JSON; without `response_format` and `enable_thinking` for their defaults."""
        fields = asdict(self)
        text, thinking = fields.pop("response_format"), fields.pop("enable_thinking")
        fields |= {} if text is None else {"response_format": json.loads(text)}
        return fields if thinking is None else fields | {"enable_thinking": thinking}


@dataclass(frozen=True)
class Protocol:
    """How tasks are run.

    Attributes:
        chat_template: "on" or "off" for all tasks; "auto": in-domain tasks as the labels, others without.
        chat_template_tasks: further tasks that get the chat template.
        gen_kwargs: generation settings for out-of-domain tasks, e.g. "max_new_tokens=2048".
        dart_max_new_tokens: limit on new tokens for DART; None: the limit of the labels.
    """

    chat_template: str = "auto"
    chat_template_tasks: tuple[str, ...] = ()
    gen_kwargs: str | None = None
    dart_max_new_tokens: int | None = None

    def parts(self, tasks: str, checkpoint: Path) -> list[Part]:
        """The runs of lm-eval that comma-separated `tasks` need, in the order of their first tasks.

        Raises:
            UserError: bad generation settings, a damaged manifest, a template for a task that is not run.
        """
        names = [name for name in tasks.split(",") if name]
        if not names:
            raise UserError("--tasks is empty; name tasks of lm-eval, comma-separated")
        if missing := sorted(set(self.chat_template_tasks) - set(names)):
            raise UserError(f"--chat_template {','.join(missing)}: neither auto, on or off, nor among --tasks {tasks}")
        labels_have_template = uses_chat_template(self.chat_template, checkpoint)
        responses = response_format_of(checkpoint)
        if responses.inject_boxed and labels_have_template:
            raise UserError(
                "--chat_template on: the labels have boxed responses, which need prompts without a template"
            )
        of_labels = None if responses == ResponseFormat() else json.dumps(responses.as_dict())
        gen_kwargs = None if self.gen_kwargs is None else canonical_gen_kwargs([self.gen_kwargs])[0]
        thinking = None if may_think(checkpoint) else False
        grouped: dict[tuple[bool, str | None, str | None, bool | None], list[str]] = {}
        for name in names:
            from_labels = is_graded_here(name)
            chat = labels_have_template if from_labels else self.chat_template == "on"
            limits = None if is_in_domain(name) else gen_kwargs
            if name.startswith("drllm_dart") and self.dart_max_new_tokens is not None:
                limits = f"{LIMIT_NAMES[0]}={self.dart_max_new_tokens}"
            chat = chat or name in self.chat_template_tasks
            direct = (of_labels, thinking if chat else None) if from_labels else (None, None)
            settings = (chat, limits, *direct)
            grouped.setdefault(settings, []).append(name)
        return [Part(",".join(members), *settings) for settings, members in grouped.items()]


def parse_path(path: str | int, num_blocks: int) -> str:
    """A static path, one digit 0 (skip), 1 (execute) or 2 (repeat) per block.

    Args:
        path: the digits; lm-eval reads unquoted digits as a number, without leading zeros.
        num_blocks: L.

    Raises:
        UserError: another number of digits, other digits, or a path that runs no block.
    """
    digits = str(path).zfill(num_blocks) if isinstance(path, int) else path
    if len(digits) != num_blocks or not set(digits) <= set("012") or not digits.strip("0"):
        raise UserError(
            f"path={path}: must have one digit 0 (skip), 1 (execute) or 2 (repeat) for each of the {num_blocks} "
            "blocks, and run at least one"
        )
    return digits


def describe_parts(parts: Iterable[dict[str, Any]]) -> list[str]:
    """One sentence per part of a recorded run, for the notes under a table."""
    return [f"{part['tasks'].replace(',', ', ')}: {', '.join(_settings(part))}." for part in parts]


def _settings(part: dict[str, Any]) -> Iterable[str]:
    thinking = " (enable_thinking=False)" if part.get("enable_thinking") is False else ""
    yield f"{'with' if part['chat_template'] else 'without'} chat template{thinking}"
    responses = ResponseFormat.of_dict(part.get("response_format") or {}).describe()
    if responses:
        yield f"response format of the labels ({responses})"
    if part["gen_kwargs"]:
        yield f"generation settings {part['gen_kwargs']}"
    elif not responses:
        yield "the tasks' generation settings"


def canonical_gen_kwargs(values: Sequence[str]) -> list[str]:
    """Values of `--gen_kwargs` with the limit on new tokens under the name that lm-eval's tasks use.

    lm-eval merges `--gen_kwargs max_new_tokens=2048`, the paper's spelling, into a task that says `max_gen_toks: 256`,
    and then prefers the latter. Under one name the command line wins.

    Args:
        values: "KEY=VALUE,KEY=VALUE" texts, or one JSON object.

    Raises:
        UserError: two limits, or a limit that is not a positive integer.
    """
    values = list(values)
    try:
        settings = json.loads(values[0]) if values else {}
    except ValueError:
        settings = None
    items = [list(settings.items())] if isinstance(settings, dict) else [_pairs(value) for value in values]
    limits = [(name, value) for group in items for name, value in group if name in LIMIT_NAMES]
    if len(limits) > 1:
        both = " and ".join(f"{name}={value}" for name, value in limits)
        raise UserError(f"--gen_kwargs has several limits on new tokens ({both}); keep one")
    for name, value in limits:
        if not str(value).isascii() or not str(value).isdigit() or int(value) == 0:
            raise UserError(f"--gen_kwargs {name}={value}: must be a positive integer")
    renamed = [[(LIMIT_NAMES[0] if name in LIMIT_NAMES else name, value) for name, value in group] for group in items]
    if isinstance(settings, dict):
        return [json.dumps(dict(renamed[0]))] if values else []
    return [",".join(f"{name}={value}" for name, value in group) for group in renamed]


def new_token_limit(gen_kwargs: str | None) -> int | None:
    """The limit on new tokens in a text of `--gen_kwargs`; None without one.

    Raises:
        UserError: see `canonical_gen_kwargs`.
    """
    (canonical,) = canonical_gen_kwargs([gen_kwargs or ""])
    items = json.loads(canonical) if canonical.startswith("{") else dict(_pairs(canonical))
    return int(items[LIMIT_NAMES[0]]) if LIMIT_NAMES[0] in items else None


def _pairs(text: str) -> list[tuple[str, str]]:
    """(key, value) of "KEY=VALUE,KEY=VALUE"; UserError for another form."""
    from lm_eval._cli.utils import split_top_level

    pairs = [tuple(part.split("=", 1)) for part in split_top_level(text)]
    if malformed := next((pair for pair in pairs if len(pair) != 2), None):
        raise UserError(f"--gen_kwargs {malformed[0]}: expected KEY=VALUE pairs, comma-separated, or a JSON object")
    return pairs
