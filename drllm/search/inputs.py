"""What every search begins with: its arguments, the model, and the questions as prompts."""

from __future__ import annotations

import argparse
import datetime
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_models import path_model_class
from drllm.arguments import MAX_SEED, add_shared, check_ranges
from drllm.checkpoints import checkpoint_info, load_tokenizer
from drllm.errors import UserError
from drllm.files import check_output_folder
from drllm.loading import loading
from drllm.manifests import Manifest
from drllm.miniature import MINIATURE_DATA, MINIATURE_MODEL
from drllm.processes import process_state
from drllm.provenance import commit, dtype_name, dtype_on, fingerprint, parse_dtype, versions
from drllm.questions.grading import GRADER_VERSION
from drllm.questions.overlap import load_training_questions
from drllm.questions.prompts import thinking_switch
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import GROUPS, SETS, expand_sets
from drllm.rollouts.batches import OPEN_BATCHES, BatchLimit, limit_on
from drllm.rollouts.rewards import HELP, PUBLISHED, REWARDS, AnyEngine, AnyPrompt, Reward, reward_named
from drllm.search.selection import digest_of, seeded_order
from drllm.search.tree import SearchSettings

WAIT_FOR_OTHERS = datetime.timedelta(days=30)  # a process that is done waits for the others, for hours if need be
# Argument -> the setting of the tree; a program need not have all of them.
TREE = {
    "num_simulations": "num_simulations",
    "budget": "budget",
    "c": "exploration",
    "length_penalty": "length_penalty",
    "p_rand": "random_child",
    "policy": "policy",
    "stop_at": "stop_at",
}


class _Joined(argparse.Action):
    """Stores several values as one text, as if commas stood between them."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, ",".join(values))


def rows_or_auto(text: str) -> int | None:
    """The value of --batch_size; None for "auto"."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def add_arguments(parser: argparse.ArgumentParser, defaults: SearchSettings) -> None:
    """Adds the arguments that every search has; `defaults` are those of its trees."""
    add = parser.add_argument
    add_shared(parser, "model", says="the miniature")
    add_shared(parser, "revision")
    add_shared(parser, "dtype", "auto", "bfloat16 on a GPU, else float32")
    add_shared(parser, "data_dir", says="the Hub")
    add_shared(parser, "dataset", "arc,dart", nargs="+", action=_Joined, about=": " + ", ".join(GROUPS | SETS))
    add_shared(parser, "unlike", "")
    add_shared(parser, "reward", PUBLISHED, choices=REWARDS, about=f"; {HELP}")
    add("--num_simulations", type=int, default=defaults.num_simulations, help="simulations per tree search")
    add("--c", type=float, default=defaults.exploration, help="exploration constant of UCB")
    add("--lambda", dest="length_penalty", type=float, default=defaults.length_penalty, help="length penalty of UCB")
    add_shared(parser, "seed", 0, about=": the order of questions, and every search")
    add_shared(
        parser,
        "batch_size",
        "auto",
        type=rows_or_auto,
        about="; halved when memory runs out; auto: what fits into a GPU's memory, 32 on a CPU (128 of a toy)",
    )
    add("--output_dir", default="data/", help="folder of the labels")


def check_arguments(args: argparse.Namespace, defaults: SearchSettings) -> SearchSettings:
    """Checks the arguments of `add_arguments` and fills in the bundled model; returns the settings of the trees.

    Raises:
        UserError: a value out of range, an unknown set, a set that the reward cannot judge, an unwritable folder, no
            such model, a family that is not supported.
    """
    ranges = dict.fromkeys(("num_simulations", "budget", "batch_size"), (1, math.inf)) | {"c": (0, math.inf)}
    ranges |= {"p_rand": (0, 1), "seed": (0, MAX_SEED)}
    check_ranges(args, **{name: limits for name, limits in ranges.items() if hasattr(args, name)})
    if not args.length_penalty >= 0:  # NaN too
        raise UserError(f"--lambda is {args.length_penalty}; it must be at least 0")
    check_output_folder(args.output_dir, "--output_dir")
    if args.dtype != "auto":
        parse_dtype(args.dtype)
    if args.unlike:
        expand_sets(args.unlike)
    reward_named(args.reward).check_sets(expand_sets(args.dataset))
    if args.data_dir is None and args.model is None:
        args.data_dir = str(MINIATURE_DATA)
    args.model = args.model or str(MINIATURE_MODEL)
    with loading(args.model, "model", args.revision):
        path_model_class(checkpoint_info(args.model, revision=args.revision).family)
    try:
        return replace(defaults, **{TREE[name]: getattr(args, name) for name in TREE if hasattr(args, name)})
    except ValueError as error:
        raise UserError(str(error)) from None


@dataclass(frozen=True)
class SearchInputs:
    """The model and the questions of a search; the same in every process.

    Attributes:
        args: the arguments of `add_arguments`.
        state: the processes.
        model: follows paths, on its device.
        chat: whether prompts have the chat template.
        response_format: how responses are limited and graded.
        prompts: prompts of each set, in the order in which they are searched.
        limit: the most of a batch: --batch_size, or what fits.
    """

    args: argparse.Namespace
    state: PartialState
    reward: Reward
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat: bool
    response_format: ResponseFormat
    prompts: dict[str, list[AnyPrompt]]
    limit: BatchLimit

    @classmethod
    def load(
        cls,
        args: argparse.Namespace,
        load_model: Callable[[str, torch.dtype, str | None], PreTrainedModel],
        most: Mapping[str, int | None],
        response_format: ResponseFormat,
        chat_template: str = "auto",
    ) -> SearchInputs:
        """Reads questions and model.

        Args:
            args: checked arguments.
            load_model: loads a model that follows paths, from (name, dtype, revision).
            most: most questions of each set, the first ones of the order that the seed draws; None: all.
            response_format: how responses are limited and graded.
            chat_template: "on", "off", or "auto" (see `wants_chat_template`).

        Raises:
            UserError: no such model, a family that is not supported, damaged files, no question that fits.
        """
        state, reward = process_state(WAIT_FOR_OTHERS), reward_named(args.reward)
        unlike = expand_sets(args.unlike) if args.unlike else ()
        with state.main_process_first():  # so that a download happens once per machine
            questions = load_training_questions(expand_sets(args.dataset), args.data_dir, unlike)
        tokenizer = load_tokenizer(args.model, args.revision)
        model = load_model(args.model, dtype_on(state.device, args.dtype), args.revision).eval().to(state.device)
        stop_ids = model.generation_config.eos_token_id
        chat, reason = reward.uses_chat_template(chat_template, args.model, tokenizer, stop_ids)
        if state.is_main_process:
            print(f"prompts {'with' if chat else 'without'} chat template: {reason}", file=sys.stderr)
        reward.check_format("on" if chat else "off", response_format.inject_boxed, response_format.strict_letters)
        context = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
        prompts, too_long = {}, 0
        for name, of_set in questions.items():
            chosen = seeded_order(of_set, args.seed)[: most[name]]
            made = [reward.prompt_of(question, tokenizer, chat, response_format) for question in chosen]
            prompts[name] = [prompt for prompt in made if prompt.total_tokens <= context]
            too_long += len(made) - len(prompts[name])
        if not any(prompts.values()):
            raise UserError(f"no question fits into the model's context of {context} tokens")
        if too_long and state.is_main_process:
            print(f"left out {too_long} questions that exceed the model's context of {context} tokens", file=sys.stderr)
        sizes = [reward.size(prompt) for of_set in prompts.values() for prompt in of_set]
        limit = limit_on(model, sizes, args.batch_size)
        return cls(args, state, reward, model, tokenizer, chat, response_format, prompts, limit)

    def questions_at_once(self, wanted: int) -> int:
        """How many searches run side by side: two batches, where memory decides at most a share of `wanted` labels."""
        most = OPEN_BATCHES * self.limit.rows
        return most if self.limit.tokens is None else max(1, min(most, -(-wanted // self.state.num_processes)))

    def engine(self, for_search: bool) -> AnyEngine:
        """What answers the prompts along paths."""
        return self.reward.engine(self.model, self.tokenizer, self.limit, for_search)

    def manifest(self, program: str, settings: SearchSettings, **arguments: object) -> Manifest:
        """The manifest of the run; `arguments` are further ones that affect the labels."""
        limits = {name: self.response_format.limit(name, self.chat) for name in self.prompts}
        tree = {name: getattr(settings, TREE[name]) for name in TREE if name != "length_penalty"}
        if settings.stop_at == SearchSettings().stop_at:  # folders that are older than the argument lack it
            del tree["stop_at"]
        tree |= {"dataset": list(self.prompts), "lambda": settings.length_penalty}
        return Manifest(
            model=self.args.model,
            revision=self.args.revision,
            model_fingerprint=fingerprint(self.model),
            num_layers=self.model.config.num_hidden_layers,
            dtype=dtype_name(self.model.dtype),
            chat_template=self.chat,
            arguments=tree
            | arguments
            | self.response_format.as_dict()
            | {"max_new_tokens": limits}
            | thinking_switch(self.tokenizer, self.chat),
            reward=self.reward.name,
            seed=self.args.seed,
            data_dir=None if self.args.data_dir is None else str(self.args.data_dir),
            questions={name: digest_of([p.question for p in of_set]) for name, of_set in self.prompts.items()},
            program=program,
            grader_version=GRADER_VERSION,
            versions=versions(),
            commit=commit(),
        )
