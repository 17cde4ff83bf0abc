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
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from drllm.arguments import HelpFormatter, check_ranges
from drllm.checkpoints import load_routed
from drllm.edits import describe_edits
from drllm.errors import UserError, main_guard
from drllm.files import beside, check_output_folder
from drllm.labels import GROUP, Example, Label, write_labels
from drllm.manifests import LABELS, begin, read_manifest
from drllm.processes import from_main
from drllm.questions.per_set import numbers_per_set
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import collections_of, expand_sets
from drllm.rollouts.batches import ROWS_ON_CPU
from drllm.rollouts.engine import Request, Rollout
from drllm.rollouts.rewards import AnyEngine, AnyPrompt, Reward
from drllm.rollouts.routed_paths import router_windows
from drllm.rollouts.scores import ScoreStore, path_text, score_all
from drllm.search.inputs import SearchInputs, add_arguments, check_arguments
from drllm.search.tree import SearchSettings
from extensions.groups.grouping import groups_of, standardised_states
from extensions.groups.shared_search import GroupLabel, SharedSettings, search_groups
from train_models.paths import Path as BlockPath
from train_models.paths import default_path

PROGRAM = "extensions.groups.search"
DEFAULT_LIMIT = 300
BY_COLLECTION = "collection"
# A mean reward varies less than one answer, so it is explored less, and a group is worth more simulations.
TREE = SearchSettings(num_simulations=200, exploration=0.1)
SHARED = SharedSettings(TREE)


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, SharedSettings]:
    """The command line, checked, and the settings of search and choice.

    Raises:
        UserError: an argument out of range, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description=__doc__.split("\n")[0],
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add_arguments(parser, TREE)
    add("--limit", default=str(DEFAULT_LIMIT), help="questions per set, all labelled: a number, or e.g. arc_easy=1200")
    add(
        "--groups",
        default="25",
        help=f'number of groups of prompts that look alike to the routers, or "{BY_COLLECTION}": one per name in '
        "--dataset",
    )
    add("--prompts_of", type=Path, help="label folder whose chat template and response format are used")
    add("--finalists", type=int, default=SHARED.finalists, help="paths of a group that all its questions try")
    add("--price", type=float, default=SHARED.price, help="reward that one block application less may cost a group")
    add("--caution", type=float, default=SHARED.caution, help="standard errors by which a gain must exceed its price")
    add("--measured_dir", type=Path, help="folder that keeps every answer; default: OUTPUT_DIR-measured")
    arguments = parser.parse_args(argv)
    tree = check_arguments(arguments, TREE)
    if arguments.groups != BY_COLLECTION and not (arguments.groups.isdecimal() and int(arguments.groups)):
        raise UserError(f'--groups {arguments.groups}: expected a number from 1 on, or "{BY_COLLECTION}"')
    check_ranges(
        arguments,
        finalists=(1, math.inf),
        **dict.fromkeys(("price", "caution"), (-math.inf, math.inf)),
    )
    limits_of(arguments)
    arguments.output_dir = Path(arguments.output_dir)
    arguments.measured_dir = arguments.measured_dir or beside(arguments.output_dir, "measured")
    check_output_folder(arguments.measured_dir, "--measured_dir")
    names = ("finalists", "price", "caution", "seed")
    return arguments, replace(SHARED, tree=tree, **{name: getattr(arguments, name) for name in names})


def limits_of(arguments: argparse.Namespace) -> dict[str, int]:
    """Most questions of each set; UserError for another form of --limit, or a number below 1."""
    sets = expand_sets(arguments.dataset)
    return dict.fromkeys(sets, DEFAULT_LIMIT) | numbers_per_set("--limit", arguments.limit, sets, str(DEFAULT_LIMIT))


def load_model(name: str, dtype: torch.dtype, revision: str | None):
    """The base model with routers that only say what they read."""
    return load_routed(name, dtype, revision, {})


@dataclass
class Measured:
    """The questions of a run and their rewards along paths, kept in `store`.

    Attributes:
        prompts: prompts of all questions; questions are named by their place here.
        engine: answers them.
    """

    reward: Reward
    prompts: Sequence[AnyPrompt]
    engine: AnyEngine
    store: ScoreStore

    def values(self, questions: Sequence[int], paths: Sequence[BlockPath]) -> list[float]:
        """The reward of each question along its path, in [0, 1]."""
        work = [(self.prompts[question], path) for question, path in zip(questions, paths, strict=True)]
        score_all(self.engine, [(prompt, [path]) for prompt, path in work], self.store, title=None)
        return [self.reward.value(prompt, self.store.get(prompt.question.id, path)) for prompt, path in work]

    def labels(self, found: GroupLabel) -> Iterator[Label]:
        """The labels of the questions of a group, with their responses."""
        default = default_path(self.engine.num_blocks)
        for start in range(0, len(found.questions), self.engine.batch_size):
            prompts = [self.prompts[index] for index in found.questions[start : start + self.engine.batch_size]]
            requests = [Request(prompt, path, True) for prompt in prompts for path in (default, found.path)]
            rollouts = iter(self._rollouts(requests))
            for prompt, base, routed in zip(prompts, rollouts, rollouts, strict=True):
                question = prompt.question
                self.engine.forget(question)
                yield Label(
                    question=question.text,
                    path=found.path,
                    answer=question.answer,
                    set=question.set,
                    question_id=question.id,
                    kind=GROUP,
                    prompt=prompt.text,
                    base_correct=base.is_right,
                    path_correct=routed.is_right,
                    base_response=base.response,
                    path_response=routed.response,
                    simulations=found.simulations,
                    inferences=found.inferences,
                    good_paths=() if found.path == default else (found.path,),
                )

    def _rollouts(self, requests: Sequence[Request]) -> list[Rollout]:
        """The answers of `requests`; only those run that the store does not tell."""
        known: list[Rollout | None] = []
        for request in requests:
            scores = self.store.get(request.prompt.question.id, request.path)
            known.append(None if scores is None else self.reward.rollout(request.prompt, scores))
        unknown = [request for request, rollout in zip(requests, known, strict=True) if rollout is None]
        answers = iter(self.engine.respond(unknown))
        return [rollout or next(answers) for rollout in known]

    def report(self, found: GroupLabel) -> dict:
        """How a group did, for the manifest."""
        return {
            "questions": Counter(self.prompts[index].question.set for index in found.questions),
            "path": path_text(found.path),
            "edits": describe_edits(found.path),
            "gain": found.gain,
            "error": found.error,
        }


def find_groups(inputs: SearchInputs, prompts: Sequence[AnyPrompt]) -> dict[int, list[int]]:
    """Number of a group -> its questions: those of a collection, or prompts that look alike on the default path."""
    arguments, model = inputs.args, inputs.model
    if arguments.groups == BY_COLLECTION:
        collections = collections_of(arguments.dataset)
        names = list(dict.fromkeys(collections.values()))
        numbers = [names.index(collections[prompt.question.set]) for prompt in prompts]
    else:
        default = default_path(model.config.num_hidden_layers)
        examples = [Example(prompt.question.id, prompt.input_ids, default) for prompt in prompts]
        states = standardised_states(*router_windows(model, examples, min(inputs.limit.rows, ROWS_ON_CPU)))
        numbers = groups_of(states, int(arguments.groups), arguments.seed).tolist()
    groups: dict[int, list[int]] = {}
    for index, number in enumerate(numbers):
        groups.setdefault(number, []).append(index)
    return dict(sorted(groups.items()))


def search(
    measured: Measured, groups: dict[int, list[int]], settings: SharedSettings, is_shown: bool
) -> dict[int, GroupLabel]:
    """Searches `groups` with a progress bar, or reads from the store what was searched before."""
    total = len(groups) * (settings.tree.num_simulations + settings.finalists)
    with tqdm(total=total, desc="simulations and finalists", unit="path", disable=not is_shown) as bar:
        return search_groups(groups, measured.engine.num_blocks, settings, measured.values, after_round=bar.update)


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
    arguments, settings = parse_arguments(argv)
    response_format, chat_template = ResponseFormat(), "auto"
    if arguments.prompts_of is not None:
        like = read_manifest(arguments.prompts_of)
        response_format, chat_template = like.response_format, "on" if like.chat_template else "off"
    inputs = SearchInputs.load(arguments, load_model, limits_of(arguments), response_format, chat_template)
    state, folder = inputs.state, arguments.output_dir
    prompts = [prompt for of_set in inputs.prompts.values() for prompt in of_set]
    names = ("limit", "unlike", "groups", "finalists", "price", "caution")
    own = {name: getattr(arguments, name) for name in names} | {"search_questions": settings.search_questions}
    manifest = inputs.manifest(PROGRAM, settings.tree, **own)
    if state.is_main_process:
        manifest = begin(folder, manifest)
    state.wait_for_everyone()
    key = {"model_fingerprint": manifest.model_fingerprint, "dtype": manifest.dtype}
    key |= inputs.reward.key(inputs.chat, inputs.response_format)
    store = ScoreStore(arguments.measured_dir, key, state.process_index)
    measured = Measured(inputs.reward, prompts, inputs.engine(for_search=False), store)
    try:
        groups = from_main(state, lambda: find_groups(inputs, prompts))
        mine = dict(list(groups.items())[state.process_index :: state.num_processes])
        found = search(measured, mine, settings, state.is_main_process)
        state.wait_for_everyone()
        if state.is_main_process:
            if state.num_processes > 1:
                store.update()
                found = search(measured, groups, settings, is_shown=False)  # from what all processes have measured
            of_groups = tqdm(found.values(), desc="responses", unit="group")
            labels = [label for group in of_groups for label in measured.labels(group)]
            labels.sort(key=lambda label: (label.set, label.question_id))
            write_labels(folder, manifest, labels, groups=list(map(measured.report, found.values())))
            print(f"{describe(list(found.values()))}\nlabels: {folder / LABELS}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"what was measured is in {arguments.measured_dir}; run the same command to resume"
        ) from None
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
