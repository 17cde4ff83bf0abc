"""Makes labels by the published search with a reward that groups of similar questions share.

    python -m extensions.groups.search --data_dir miniature/data --output_dir data/groups
    python train.py --data data/groups
    accelerate launch --num_processes 8 -m extensions.groups.search --model meta-llama/Llama-3.2-3B-Instruct \
        --dataset arc,dart --output_dir data/3b-groups

A variant of data_generation.py (extensions/groups/shared_search.py). Questions that look alike to the routers on the
default path form a group. Each group has one tree search, whose reward is the mean over questions of the group, and one
label. It can be stopped at any moment: run the same command to resume, with any number of processes and any batch size.
Every answer is kept in --measured_dir, also for other prices and numbers of simulations.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel

from drllm.arguments import MAX_SEED, check_ranges
from drllm.checkpoints import load_routed, load_tokenizer
from drllm.edits import describe_edits
from drllm.errors import UserError, main_guard
from drllm.files import beside, check_output_folder, write_json, write_whole
from drllm.labels import FORMAT, GROUP, LABELS, MANIFEST
from drllm.miniature import MINIATURE_DATA, MINIATURE_MODEL
from drllm.processes import from_main, process_state
from drllm.provenance import commit, dtype_name, dtype_on, fingerprint, parse_dtype, versions
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.questions.overlap import load_training_questions
from drllm.questions.per_set import numbers_per_set
from drllm.questions.prompts import Prompt, split_by_context
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import collections_of, expand_sets
from drllm.rollouts.engine import Request, RolloutEngine
from drllm.rollouts.likelihood import LikelihoodEngine
from drllm.rollouts.rewards import REWARDS, Reward, reward_named
from drllm.rollouts.routed_paths import router_windows
from drllm.rollouts.scores import ScoreStore, path_text, score_all
from drllm.search.progress import begin
from drllm.search.selection import digest_of, seeded_order
from drllm.search.tree import DEFAULT_POLICY, POLICIES, SearchSettings
from extensions.groups.grouping import groups_of, standardised_states
from extensions.groups.shared_search import GroupLabel, SharedSettings, search_groups
from train_models.paths import Path as BlockPath
from train_models.paths import default_path

DEFAULT_LIMIT = 300
WAIT_FOR_OTHERS = datetime.timedelta(days=30)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an argument out of range, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m extensions.groups.search",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, shared, tree = parser.add_argument, SharedSettings(), SearchSettings()
    add("--model", default=str(MINIATURE_MODEL), help="folder or Hub name of a base model")
    add("--revision", help="of a model on the Hub")
    add("--dtype", default="auto", help="of the base; auto: bfloat16 on a GPU, float32 on a CPU")
    add("--data_dir", type=Path, help="local question files; without it, those of the bundled model, or the Hub")
    add("--dataset", default="arc,dart", help="question sets and groups, comma-separated")
    add("--unlike", default="", help="sets: no question that nearly repeats one of their test questions")
    add("--limit", default="300", help="questions per set, all of which get a label: a number, or e.g. arc_easy=1200")
    add(
        "--group_by",
        choices=("states", "collection"),
        default="states",
        help="states: --groups of prompts that look alike to the routers; collection: a group per name in --dataset",
    )
    add(
        "--reward",
        choices=REWARDS,
        default="generation",
        help="of a question; generation: 1 for a right answer; likelihood: probability of the right option",
    )
    add("--groups", type=int, default=25, help="groups of similar questions")
    add("--search_questions", type=int, default=shared.search_questions, help="of a group, that the tree sees")
    add("--num_simulations", type=int, default=200, help="of the tree search, per group")
    add("--budget", type=float, default=tree.budget, help="longest path, in multiples of the number of blocks")
    add("--c", type=float, default=0.1, help="exploration constant of UCB; a mean reward varies less than an answer")
    add("--lambda", dest="length_penalty", type=float, default=tree.length_penalty, help="length penalty of UCB")
    add("--p_rand", type=float, default=tree.random_child, help="probability of a random child")
    add("--policy", choices=POLICIES, default=DEFAULT_POLICY, help="which nodes of the tree grow")
    add("--finalists", type=int, default=shared.finalists, help="paths of a group that all its questions try")
    add("--price", type=float, default=shared.price, help="reward that one block application less may cost a group")
    add("--caution", type=float, default=shared.caution, help="standard errors by which a gain must exceed its price")
    add("--batch_size", type=int, default=128, help="questions per forward pass")
    add("--seed", type=int, default=0, help="of the order of questions, the groups and every search")
    add("--measured_dir", type=Path, help="keeps every answer; default: OUTPUT_DIR-measured")
    add("--output_dir", type=Path, required=True, help="folder of the labels")
    arguments = parser.parse_args(argv)
    check_ranges(
        arguments,
        **dict.fromkeys(("groups", "search_questions", "num_simulations", "batch_size"), (1, math.inf)),
        **dict.fromkeys(("budget", "finalists"), (1, math.inf)),
        **dict.fromkeys(("price", "caution"), (-math.inf, math.inf)),
        c=(0, math.inf),
        p_rand=(0, 1),
        seed=(0, MAX_SEED),
    )
    if not arguments.length_penalty >= 0:  # NaN too
        raise UserError(f"--lambda is {arguments.length_penalty}; it must be at least 0")
    for sets in filter(None, (arguments.dataset, arguments.unlike)):
        expand_sets(sets)
    limits_of(arguments)
    reward_named(arguments.reward).check_sets(expand_sets(arguments.dataset))
    if arguments.dtype != "auto":
        parse_dtype(arguments.dtype)
    check_output_folder(arguments.output_dir, "--output_dir")
    if arguments.measured_dir is None:
        arguments.measured_dir = beside(arguments.output_dir, "measured")
    check_output_folder(arguments.measured_dir, "--measured_dir")
    if arguments.data_dir is None and arguments.model == str(MINIATURE_MODEL):
        arguments.data_dir = MINIATURE_DATA
    return arguments


def limits_of(arguments: argparse.Namespace) -> dict[str, int]:
    """Questions of each set; UserError for another form of --limit, or a number below 1."""
    sets = expand_sets(arguments.dataset)
    return dict.fromkeys(sets, DEFAULT_LIMIT) | numbers_per_set("--limit", arguments.limit, sets, str(DEFAULT_LIMIT))


def settings_of(arguments: argparse.Namespace) -> SharedSettings:
    """The settings of search and choice; UserError where the tree refuses them."""
    try:
        tree = SearchSettings(
            arguments.num_simulations,
            arguments.budget,
            arguments.c,
            arguments.length_penalty,
            arguments.p_rand,
            arguments.policy,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    names = ("search_questions", "finalists", "price", "caution", "seed")
    return SharedSettings(tree, **{name: getattr(arguments, name) for name in names})


@dataclass
class Measured:
    """The questions of a run and their rewards along paths, kept in `store`.

    Attributes:
        engine: generates and grades responses, or scores options.
        prompts: all questions; they are named by their place here.
    """

    reward: Reward
    engine: RolloutEngine | LikelihoodEngine
    prompts: Sequence[Prompt] | Sequence[LikelihoodPrompt]
    store: ScoreStore

    def rewards(self, questions: Sequence[int], paths: Sequence[BlockPath]) -> list[float]:
        """In [0, 1]: whether the response is right, or the probability of the right option."""
        prompts = [self.prompts[question] for question in questions]
        score_all(
            self.engine, [(prompt, [path]) for prompt, path in zip(prompts, paths, strict=True)], self.store, None
        )
        return [
            self.reward.value(prompt, self.store.get(prompt.question.id, path))
            for prompt, path in zip(prompts, paths, strict=True)
        ]

    def rows(self, label: GroupLabel) -> list[dict]:
        """The rows of labels.jsonl for the questions of a group."""
        default = default_path(self.engine.num_blocks)
        rows = []
        for start in range(0, len(label.questions), self.engine.batch_size):
            prompts = [self.prompts[index] for index in label.questions[start : start + self.engine.batch_size]]
            requests = [Request(prompt, path, True) for prompt in prompts for path in (default, label.path)]
            rollouts = iter(self.engine.respond(requests))
            for prompt in prompts:
                base, routed, question = next(rollouts), next(rollouts), prompt.question
                self.engine.forget(question)
                rows.append(
                    {
                        "question": question.text,
                        "optimal_layer_config": list(label.path),
                        "answer": question.answer,
                        "set": question.set,
                        "question_id": question.id,
                        "kind": GROUP,
                        "prompt": prompt.text,
                        "base_correct": base.is_right,
                        "path_correct": routed.is_right,
                        "base_response": base.response,
                        "path_response": routed.response,
                        "simulations": label.simulations,
                        "inferences": label.inferences,
                        "good_paths": [] if label.path == default else [list(label.path)],
                    }
                )
        return rows


def load_base(arguments: argparse.Namespace, state: PartialState) -> PreTrainedModel:
    """The base model on this process's device, with routers that only say what they read."""
    dtype = dtype_on(state.device, arguments.dtype)
    return load_routed(arguments.model, dtype, arguments.revision, {}).eval().to(state.device)


def read_prompts(arguments: argparse.Namespace, tokenizer, chat: bool, context: int, state: PartialState) -> list:
    """The questions of all sets as prompts, in seeded order per set, as data_generation.py takes them."""

    def prompt_of(question):
        return reward_named(arguments.reward).prompt_of(question, tokenizer, chat)

    with state.main_process_first():  # so that a download happens once per machine
        unlike = expand_sets(arguments.unlike) if arguments.unlike else ()
        sets = load_training_questions(expand_sets(arguments.dataset), arguments.data_dir, unlike)
    prompts = []
    for name, of_set in sets.items():
        chosen = seeded_order(of_set, arguments.seed)[: limits_of(arguments)[name]]
        prompts += map(prompt_of, split_by_context(chosen, prompt_of, context)[0])
    if not prompts:
        raise UserError(f"no question fits into the model's context of {context} tokens")
    return prompts


def make_manifest(arguments: argparse.Namespace, routed: PreTrainedModel, prompts: Sequence, chat: bool) -> dict:
    """The manifest of the run, as data_generation.py writes it; what affects the labels is compared on resuming."""
    names = (
        "limit",
        "unlike",
        "group_by",
        "groups",
        "search_questions",
        "num_simulations",
        "budget",
        "c",
        "p_rand",
        "policy",
    )
    sets = expand_sets(arguments.dataset)
    response_format = ResponseFormat().as_dict() | {
        "max_new_tokens": {name: ResponseFormat().limit(name, chat) for name in sets}
    }
    of_set = {name: [p.question for p in prompts if p.question.set == name] for name in sets}
    return {
        "format": FORMAT,
        "program": "extensions.groups.search",
        "revision": arguments.revision,
        "seed": arguments.seed,
        "model": arguments.model,
        "model_fingerprint": fingerprint(routed),
        "num_layers": routed.config.num_hidden_layers,
        "dtype": dtype_name(routed.dtype),
        "chat_template": chat,
        "reward": arguments.reward,
        "data_dir": None if arguments.data_dir is None else str(arguments.data_dir),
        "questions": {name: digest_of(questions) for name, questions in of_set.items()},
        "arguments": {"dataset": list(sets), "lambda": arguments.length_penalty}
        | {name: getattr(arguments, name) for name in (*names, "finalists", "price", "caution")}
        | response_format,
        "versions": versions(),
        "commit": commit(),
    }


def find_groups(arguments: argparse.Namespace, routed: PreTrainedModel, prompts: Sequence) -> dict[int, list[int]]:
    """Number of a group -> its questions: those of a collection, or prompts that look alike on the default path."""
    groups: dict[int, list[int]] = {}
    if arguments.group_by == "collection":
        collections = collections_of(arguments.dataset)
        names = list(dict.fromkeys(collections.values()))
        for index, prompt in enumerate(prompts):
            groups.setdefault(names.index(collections[prompt.question.set]), []).append(index)
        return groups
    default = [default_path(routed.config.num_hidden_layers)] * len(prompts)
    windows, mask = router_windows(routed, [prompt.input_ids for prompt in prompts], default, arguments.batch_size)
    for index, number in enumerate(
        groups_of(standardised_states(windows, mask), arguments.groups, arguments.seed).tolist()
    ):
        groups.setdefault(number, []).append(index)
    return dict(sorted(groups.items()))


def search(
    measured: Measured, groups: dict[int, list[int]], arguments: argparse.Namespace, is_shown: bool
) -> dict[int, GroupLabel]:
    """Searches `groups` with a progress bar, or reads from the store what was searched before."""
    total = len(groups) * (arguments.num_simulations + arguments.finalists)
    with tqdm(total=total, desc="simulations and finalists", unit="path", disable=not is_shown) as bar:
        return search_groups(
            groups, measured.engine.num_blocks, settings_of(arguments), measured.rewards, after_round=bar.update
        )


def write_labels(folder: Path, manifest: dict, measured: Measured, labels: dict[int, GroupLabel]) -> None:
    """labels.jsonl, and the manifest that says it is complete and how the groups did."""
    rows = [row for label in tqdm(labels.values(), desc="responses", unit="group") for row in measured.rows(label)]
    rows.sort(key=lambda row: (row["set"], row["question_id"]))
    write_whole(folder / LABELS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    groups = [
        {
            "questions": Counter(measured.prompts[index].question.set for index in label.questions),
            "path": path_text(label.path),
            "edits": describe_edits(label.path),
            "gain": label.gain,
            "error": label.error,
        }
        for label in labels.values()
    ]
    write_json(folder / MANIFEST, manifest | {"labels": len(rows), "groups": groups})


def describe(labels: Sequence[GroupLabel]) -> str:
    """One line: groups with an edited path, and the mean layers and gain of their questions."""
    count = sum(len(label.questions) for label in labels)
    edited = sum(label.path != default_path(len(label.path)) for label in labels)
    layers = sum(sum(label.path) * len(label.questions) for label in labels) / count
    gain = 100 * sum(label.gain * len(label.questions) for label in labels) / count
    return (
        f"{count} labels: {edited} of {len(labels)} groups have a path of their own, {layers:.2f} layers and "
        f"{gain:+.2f} points of reward on average over the questions that chose them"
    )


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    arguments = parse_arguments(argv)
    settings_of(arguments)
    state = process_state(WAIT_FOR_OTHERS)
    tokenizer = load_tokenizer(arguments.model, arguments.revision)
    routed = load_base(arguments, state)
    reward = reward_named(arguments.reward)
    chat = reward.uses_chat_template("auto", arguments.model, tokenizer)
    context = getattr(routed.config, "max_position_embeddings", None) or sys.maxsize
    prompts = read_prompts(arguments, tokenizer, chat, context, state)
    manifest = make_manifest(arguments, routed, prompts, chat)
    if state.is_main_process:
        begin(arguments.output_dir, manifest)
    state.wait_for_everyone()
    engine = reward.engine(routed, tokenizer, arguments.batch_size)
    key = {name: manifest[name] for name in ("model_fingerprint", "dtype")}
    key |= reward.key(chat, ResponseFormat())
    measured = Measured(reward, engine, prompts, ScoreStore(arguments.measured_dir, key, state.process_index))
    try:
        groups = from_main(state, lambda: find_groups(arguments, routed, prompts))
        mine = dict(list(groups.items())[state.process_index :: state.num_processes])
        labels = search(measured, mine, arguments, state.is_main_process)
        state.wait_for_everyone()
        if state.is_main_process:
            if state.num_processes > 1:
                measured.store.update()
                labels = search(measured, groups, arguments, is_shown=False)  # from what all processes have measured
            write_labels(arguments.output_dir, manifest, measured, labels)
            print(describe(list(labels.values())))
            print(f"labels: {arguments.output_dir / LABELS}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"what was measured is in {arguments.measured_dir}; run the same command to resume"
        ) from None
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
