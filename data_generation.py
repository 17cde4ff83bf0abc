"""Step 1 of 3: searches a routing label for every training question (Section 4 of the paper).

    python data_generation.py                                     # the bundled toy model ("miniature"), on a laptop
    accelerate launch --num_processes 8 data_generation.py --model meta-llama/Llama-3.2-3B-Instruct --dataset arc,dart

Writes labels.jsonl and manifest.json into --output_dir. A run that was stopped at any moment is resumed by the same
command, with any number of processes and any batch size.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import math
import sys
from pathlib import Path
from typing import Any

import torch

from data_models import load_path_model
from drllm import labels, provenance
from drllm.arguments import MAX_SEED, check_ranges
from drllm.checkpoints import load_tokenizer
from drllm.errors import UserError, main_guard
from drllm.files import check_output_folder
from drllm.loading import check_finite, loading
from drllm.miniature import MINIATURE_DATA, MINIATURE_MODEL
from drllm.processes import process_state
from drllm.questions.overlap import load_training_questions
from drllm.questions.per_set import numbers_per_set
from drllm.questions.prompts import split_by_context
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import GROUPS, SETS, Question, expand_sets
from drllm.rollouts.rewards import HELP as REWARD_HELP
from drllm.rollouts.rewards import PUBLISHED, REWARDS, reward_named
from drllm.search.pool import SearchPool
from drllm.search.report import shortfall_lines, table2_text
from drllm.search.run import search_labels
from drllm.search.selection import Selection, digest_of, seeded_order
from drllm.search.tree import DEFAULT_POLICY, POLICIES, SearchSettings

DEFAULT_SAMPLES = 1000  # of sets that are not in Table 2
BATCH_SIZE = 128  # to begin with; a batch that does not fit into memory is halved
WAIT_FOR_OTHERS = datetime.timedelta(days=30)  # a process that is done waits for the others, for hours if need be


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; defaults are the paper's."""
    parser = argparse.ArgumentParser(
        description="Search routing labels.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    paper = SearchSettings()
    add = parser.add_argument
    add("--model", default=None, help="folder or Hub name of a Llama, Qwen2 or Qwen3 model; default: the miniature")
    add("--revision", default=None, help="of the model on the Hub")
    add("--dataset", nargs="+", default=["arc,dart"], help="sets and groups: " + ", ".join(GROUPS | SETS))
    add("--data_dir", default=None, help="folder with local files of the Hub's schema; default: the Hub")
    add("--output_dir", default="data/", help="folder of the labels")
    add("--num_simulations", type=int, default=paper.num_simulations, help="of the tree search, per question")
    add("--budget", type=float, default=paper.budget, help="longest path, in multiples of the number of blocks")
    add("--c", type=float, default=paper.exploration, help="exploration constant of UCB")
    add("--lambda", dest="length_penalty", type=float, default=paper.length_penalty, help="length penalty of UCB")
    add("--p_rand", type=float, default=paper.random_child, help="probability of a random child")
    add("--policy", choices=POLICIES, default=DEFAULT_POLICY, help="which nodes of the tree grow")
    add(
        "--samples",
        default="paper",
        help='labels to keep per set: "paper" (Table 2), a number, or e.g. arc_easy=400,dart-1=200 (rest: paper)',
    )
    add("--wrong_to_right_share", type=float, default=0.3, help="target share of all labels")
    add("--limit", type=int, default=None, help="search at most this number of questions per set")
    add(
        "--unlike",
        default="",
        help="sets, comma-separated: no question that nearly repeats one of their test questions",
    )
    add("--seed", type=int, default=0, help="of the order of questions and of every search")
    add("--dtype", default="auto", help="of the weights: bfloat16, float32, ...; auto: bfloat16 on a GPU, else float32")
    add("--chat_template", choices=("auto", "on", "off"), default="auto", help="auto: for models named ...instruct")
    add(
        "--max_new_tokens",
        default="default",
        help="of a response: a number, or e.g. arc=10,dart=20; default: ARC 10 with a chat template, else 2; DART 15",
    )
    add(
        "--reward",
        choices=REWARDS,
        default=PUBLISHED,
        help=REWARD_HELP,
    )
    add("--inject_boxed", action="store_true", help=r"end math prompts with \boxed{ (Appendix A, for base models)")
    add(
        "--strict_letters",
        action="store_true",
        help="multiple choice: the response must begin with A, B, C or D, standing alone, so items with labels 1 to 4 "
        "or E are wrong; without it, every item's own labels count, in the usual phrasings",
    )
    add("--batch_size", type=int, default=BATCH_SIZE, help="rows per batch; halved when memory runs out")
    add("--concurrency", type=int, default=None, help="questions searched at once; default: 2 batches")
    args = parser.parse_args(arguments)
    args.dataset = ",".join(args.dataset)
    return args


def check_arguments(args: argparse.Namespace) -> SearchSettings:
    """Checks the values that need no data and no model; returns the settings of the search."""
    check_ranges(
        args,
        num_simulations=(1, math.inf),
        budget=(1, math.inf),
        c=(0, math.inf),
        p_rand=(0, 1),
        wrong_to_right_share=(0, 1),
        limit=(1, math.inf),
        seed=(0, MAX_SEED),
        batch_size=(1, math.inf),
        concurrency=(1, math.inf),
    )
    if not args.length_penalty >= 0:  # NaN too
        raise UserError(f"--lambda is {args.length_penalty}; it must be at least 0")
    check_output_folder(args.output_dir, "--output_dir")
    if args.dtype != "auto":
        provenance.parse_dtype(args.dtype)
    if args.unlike:
        expand_sets(args.unlike)
    reward = reward_named(args.reward)
    reward.check_format(args.chat_template, args.inject_boxed, args.strict_letters)
    reward.check_sets(expand_sets(args.dataset))
    try:
        return SearchSettings(args.num_simulations, args.budget, args.c, args.length_penalty, args.p_rand, args.policy)
    except ValueError as error:
        raise UserError(str(error)) from None


def load(name: str, revision: str | None, dtype: torch.dtype, device: torch.device):
    """(model, tokenizer). UserError: no such model, a family that is not supported, non-finite weights."""
    tokenizer = load_tokenizer(name, revision)
    with loading(name, "model", revision):
        model = load_path_model(name, dtype=dtype, revision=revision)
    check_finite(model, name)
    return model.to(device), tokenizer


def make_manifest(args: argparse.Namespace, sets: list[str], **items: Any) -> dict[str, Any]:
    """The manifest of the run: `items`, the arguments that affect labels, and versions."""
    names = ("num_simulations", "budget", "c", "p_rand", "policy", "wrong_to_right_share", "limit")
    arguments = {"dataset": sets, "lambda": args.length_penalty} | {name: getattr(args, name) for name in names}
    items["arguments"] = arguments | items["arguments"]
    provenance_items = {"versions": provenance.versions(), "commit": provenance.commit()}
    return {"format": labels.FORMAT, "revision": args.revision, "seed": args.seed, **items, **provenance_items}


def order_questions(
    questions: dict[str, list[Question]], args: argparse.Namespace, prompt_of: Any, config: Any, is_main_process: bool
) -> dict[str, list[Question]]:
    """The questions of every set in the order in which they are searched, without those that exceed the context."""
    context = getattr(config, "max_position_embeddings", None) or sys.maxsize
    orders, too_long = {}, 0
    for name, of_set in questions.items():
        orders[name], dropped = split_by_context(seeded_order(of_set, args.seed)[: args.limit], prompt_of, context)
        too_long += dropped
    if too_long and is_main_process:
        print(f"left out {too_long} questions that exceed the model's context of {context} tokens", file=sys.stderr)
    return orders


@main_guard
def main(arguments: list[str] | None = None) -> None:
    """Runs step 1."""
    args = parse_arguments(arguments)
    settings = check_arguments(args)
    sets = expand_sets(args.dataset)
    table2 = {name: SETS[name].samples or DEFAULT_SAMPLES for name in sets}
    samples = table2 | numbers_per_set("--samples", args.samples, sets, "paper")
    limits = numbers_per_set("--max_new_tokens", args.max_new_tokens, sets, "default")
    response_format = ResponseFormat(limits, args.inject_boxed, args.strict_letters)
    name = args.model or str(MINIATURE_MODEL)
    data_dir = args.data_dir or (None if args.model else MINIATURE_DATA)

    state = process_state(WAIT_FOR_OTHERS)
    dtype = provenance.dtype_on(state.device, args.dtype)
    with state.main_process_first():  # so that a download happens once per machine
        questions = load_training_questions(sets, data_dir, expand_sets(args.unlike) if args.unlike else ())
    model, tokenizer = load(name, args.revision, dtype, state.device)
    reward = reward_named(args.reward)
    chat = reward.uses_chat_template(args.chat_template, name, tokenizer)
    if args.inject_boxed and chat:
        raise UserError(f"--inject_boxed is for base models, but {name} gets a chat template; use --chat_template off")
    limits = {set_name: response_format.limit(set_name, chat) for set_name in sets}
    prompt_of = functools.partial(reward.prompt_of, tokenizer=tokenizer, chat=chat, response_format=response_format)
    engine = reward.engine(model, tokenizer, args.batch_size, for_search=True)
    orders = order_questions(questions, args, prompt_of, model.config, state.is_main_process)

    manifest = make_manifest(
        args,
        sets,
        model=name,
        model_fingerprint=provenance.fingerprint(model),
        num_layers=model.config.num_hidden_layers,
        dtype=provenance.dtype_name(dtype),
        chat_template=chat,
        reward=args.reward,
        data_dir=None if data_dir is None else str(data_dir),
        questions={set_name: digest_of(order) for set_name, order in orders.items()},
        arguments={"samples": samples} | response_format.as_dict() | {"max_new_tokens": limits},
    )
    pool = SearchPool(engine, settings, args.seed, args.concurrency or 2 * args.batch_size)
    selection = Selection(orders, samples, args.wrong_to_right_share)
    completed = search_labels(Path(args.output_dir), manifest, selection, pool, prompt_of, state)
    if completed is not None:
        print(table2_text(completed["table2"]))
        for line in (*shortfall_lines(completed), f"labels: {Path(args.output_dir) / 'labels.jsonl'}"):
            print(line)
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
