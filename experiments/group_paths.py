"""Makes a routed checkpoint from questions with labels of groups of similar questions (see drllm/group_paths).

    python -m experiments.group_paths --data_dir miniature/data --price 0.004 --output_dir checkpoints/groups
    python -m experiments.group_paths --reward likelihood --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset arc,openbookqa,commonsense --unlike arc,openbookqa,commonsense --output_dir checkpoints/groups
    accelerate launch --num_processes 8 -m experiments.group_paths --model meta-llama/Llama-3.2-3B-Instruct \
        --output_dir checkpoints/groups

Does what data_generation.py and train.py do together, with one process per GPU. It can be stopped at any moment: run
the same command to resume. `experiments.compare_methods` compares the method with the published one and with controls,
the price chosen on validation questions.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from drllm.arguments import MAX_SEED, check_ranges
from drllm.checkpoints import load_routed, load_tokenizer, save_checkpoint
from drllm.errors import UserError, main_guard
from drllm.files import beside, check_output_folder, read_json
from drllm.group_paths.growth_arguments import add_growth_arguments, check_growth_arguments, growth_of
from drllm.group_paths.likelihood_paths import LikelihoodPaths, groups_by_set, groups_by_states
from drllm.group_paths.likelihood_rewards import LikelihoodRewards
from drllm.group_paths.margin_rewards import Answered, MarginRewards, RoundStore
from drllm.group_paths.parts import DEFAULT_TRAIN, DEFAULT_VALIDATION, Parts
from drllm.group_paths.paths import PathsOfGroups, describe_edits, path_of_edits
from drllm.miniature import MINIATURE_DATA, MINIATURE_MODEL
from drllm.processes import process_state
from drllm.provenance import commit, dtype_name, dtype_on, fingerprint, parse_dtype, versions
from drllm.questions.likelihood import REWARDS, LikelihoodPrompt, require_choices
from drllm.questions.prompts import Prompt, wants_chat_template
from drllm.questions.sets import Question, collections_of, expand_sets
from drllm.rollouts.scores import ScoreStore
from train_models.paths import Path as BlockPath
from train_models.paths import is_allowed

PATHS_EXAMPLE = '{"arc": ["skip 19, repeat 27"]}'


@dataclass(frozen=True)
class Trained:
    """What routers were trained on.

    Attributes:
        labels: one path per question.
        groups: `LikelihoodPaths.report()`, for the manifest.
        price: at which they were chosen; None: --price.
    """

    labels: list[BlockPath]
    groups: list[dict] = field(default_factory=list)
    price: float | None = None


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an argument out of range, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.group_paths",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=str(MINIATURE_MODEL), help="folder or Hub name of a base model")
    add("--revision", help="of a model on the Hub")
    add("--dtype", default="auto", help="of the base; auto: bfloat16 on a GPU, float32 on a CPU")
    add(
        "--data_dir",
        type=Path,
        help="local question files in the Hub's schema; without it, those of the bundled model, or the Hub",
    )
    add("--dataset", default="arc,dart", help="question sets and groups, comma-separated")
    add(
        "--unlike",
        default="",
        help="sets, comma-separated: no question that nearly repeats one of their test questions",
    )
    add("--train_questions", default=DEFAULT_TRAIN, help="most per set: a number, or e.g. arc_easy=1600,openbookqa=900")
    add("--reward", choices=REWARDS, default="generation", help="what counts as a right answer")
    add("--groups", type=int, default=20, help="groups of similar questions")
    add("--most_skips", type=int, default=4, help="skipped blocks of a group's path; edits with --reward likelihood")
    add("--price", type=float, default=0.004, help="reward that one block application less may cost a group")
    likelihood = parser.add_argument_group("with --reward likelihood or likelihood_norm")
    add = likelihood.add_argument
    add(
        "--group_by",
        choices=("set", "collection", "states"),
        default="set",
        help="a group per question set, per name in --dataset (arc: both its sets), or --groups of similar states",
    )
    add(
        "--validation_questions",
        default=DEFAULT_VALIDATION,
        help="further questions per set; they choose the edits in use",
    )
    add("--paths", type=Path, help=f"JSON of paths to choose among, such as {PATHS_EXAMPLE}; none is grown")
    add("--most_layers", type=float, help="raise the price that chooses until labels take as few blocks on average")
    add(
        "--keep_edits",
        type=float,
        help="share of the validation questions that keep their edits; where routers are less sure they execute",
    )
    add(
        "--domain",
        type=float,
        help="share of the validation questions that are like the training questions; for prompts that are less like "
        "them than these, routers execute",
    )
    add("--domain_rank", type=int, default=256, help="principal components that tell which prompts are alike")
    add_growth_arguments(likelihood)
    add = parser.add_argument
    add("--batch_size", type=int, default=64, help="questions per forward pass")
    add("--seed", type=int, default=0, help="of the order of questions")
    add("--router_seed", type=int, help="of the routers' initial weights and training; default: --seed")
    add("--measured_dir", type=Path, help="keeps what was measured; default: OUTPUT_DIR-measured")
    add("--output_dir", type=Path, required=True, help="folder of the checkpoint")
    arguments = parser.parse_args(argv)
    check_arguments(arguments)
    if arguments.router_seed is None:
        arguments.router_seed = arguments.seed
    if arguments.data_dir is None and arguments.model == str(MINIATURE_MODEL):
        arguments.data_dir = MINIATURE_DATA
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Checks what needs no model and no data, and sets the default of --measured_dir.

    Raises:
        UserError: an argument out of range, or an output that cannot be written.
    """
    check_growth_arguments(arguments)
    check_ranges(
        arguments,
        **dict.fromkeys(("groups", "batch_size"), (1, math.inf)),
        **dict.fromkeys(("most_skips", "most_layers"), (0, math.inf)),
        price=(-math.inf, math.inf),
        **dict.fromkeys(("keep_edits", "domain"), (0, 1)),
        domain_rank=(1, math.inf),
        seed=(0, MAX_SEED),
        router_seed=(0, MAX_SEED),
    )
    if arguments.unlike:
        expand_sets(arguments.unlike)
    sets = expand_sets(arguments.dataset)
    parts = Parts.of(sets, arguments.train_questions, arguments.validation_questions)
    for name in ("keep_edits", "domain"):
        if getattr(arguments, name) is not None and not any(parts.validation.values()):
            raise UserError(f"--{name} is a share of the validation questions; give --validation_questions")
    if arguments.reward != "generation":
        require_choices(sets)
    if arguments.dtype != "auto":
        parse_dtype(arguments.dtype)
    check_output_folder(arguments.output_dir, "--output_dir")
    if arguments.measured_dir is None:
        arguments.measured_dir = beside(arguments.output_dir, "measured")
    check_output_folder(arguments.measured_dir, "--measured_dir")


def load_base(arguments: argparse.Namespace, state: PartialState) -> PreTrainedModel:
    """The base model with fresh routers, on this process's device; its config records the base."""
    dtype = dtype_on(state.device, arguments.dtype)
    fields = {} if arguments.domain is None else {"router_domain": arguments.domain_rank}
    routed = load_routed(arguments.model, dtype, arguments.revision, fields).eval().to(state.device)
    config = routed.config
    config.base_model_name, config.base_model_revision = arguments.model, arguments.revision
    config.base_model_fingerprint = fingerprint(routed)
    config.trained_num_windows = config.num_windows
    return routed


def train_by_generation(arguments: argparse.Namespace, routed, tokenizer, measured: Path, state) -> Trained:
    """Trains the routers on paths that keep generated answers right."""
    chat = wants_chat_template("auto", arguments.model, tokenizer)
    questions = [
        Answered.of(Prompt.of(question, tokenizer, chat), tokenizer)
        for train, _ in read_questions(arguments, state).values()
        for question in train
    ]
    store = RoundStore(measured, routed.config.base_model_fingerprint, state)
    rewards = MarginRewards(routed, questions, arguments.batch_size, store)
    paths = PathsOfGroups(rewards, arguments.groups, arguments.most_skips)
    labels = paths.labels(arguments.price)
    describe(labels, state)
    paths.train_routers(arguments.price, arguments.router_seed)
    return Trained(labels)


def train_by_likelihood(arguments: argparse.Namespace, routed, tokenizer, measured: Path, state) -> Trained:
    """Trains the routers on paths that raise the likelihood of right options."""
    chosen, validation = [], []
    for of_set in read_questions(arguments, state).values():
        for is_validation, part in enumerate(of_set):
            chosen += part
            validation += [bool(is_validation)] * len(part)
    prompts = [LikelihoodPrompt.of(question, tokenizer) for question in chosen]
    key = {"model_fingerprint": routed.config.base_model_fingerprint, "dtype": dtype_name(routed.dtype)}
    store = ScoreStore(measured, key, state.process_index)
    normalised = arguments.reward == "likelihood_norm"
    rewards = LikelihoodRewards(routed, prompts, store, state, arguments.batch_size, normalised)
    growth = growth_of(arguments, arguments.most_skips)
    if arguments.group_by == "states":
        groups = groups_by_states(rewards, arguments.groups)
    else:
        by_collection = arguments.group_by == "collection"
        groups = groups_by_set(prompts, collections_of(arguments.dataset) if by_collection else None)
    given = given_paths(arguments.paths, routed.config.num_hidden_layers, prompts, groups) if arguments.paths else None
    paths = LikelihoodPaths(rewards, groups, growth, torch.tensor(validation), given)
    price = arguments.price if arguments.most_layers is None else paths.price_within(arguments.most_layers)
    labels = paths.labels(price)
    describe(labels, state)
    paths.train_routers(labels, arguments.router_seed, arguments.keep_edits, arguments.domain)
    return Trained(labels, paths.report(), price)


def given_paths(
    file: Path, num_blocks: int, prompts: list[LikelihoodPrompt], groups: torch.Tensor
) -> list[list[BlockPath]]:
    """For each group the paths that the file of --paths has for the sets of its questions.

    Raises:
        UserError: the file is damaged, or names a set, a block or an action that does not exist, or a path that the
            search would not allow.
    """
    paths: dict[str, list[BlockPath]] = {}
    for names, edits_of_paths in read_json(file, f"write, for example, {PATHS_EXAMPLE}").items():
        for name in expand_sets(names):
            try:
                own = [path_of_edits(edits, num_blocks) for edits in edits_of_paths]
            except (ValueError, TypeError):
                raise UserError(f"--paths {file}: {names} is not a list of edits, as in {PATHS_EXAMPLE}") from None
            for path in own:
                if not (sum(path) and is_allowed(path)):
                    raise UserError(f"--paths {file}: {names} has {describe_edits(path)}; at most two skips in a row")
            paths.setdefault(name, []).extend(own)
    of_group: list[list[BlockPath]] = [[] for _ in range(int(groups.max()) + 1)]
    for prompt, group in zip(prompts, groups.tolist(), strict=True):
        of_group[group] += [path for path in paths.get(prompt.question.set, ()) if path not in of_group[group]]
    return of_group


def read_questions(
    arguments: argparse.Namespace, state: PartialState
) -> dict[str, tuple[list[Question], list[Question]]]:
    """(training, validation) questions of each set."""
    parts = Parts.of(expand_sets(arguments.dataset), arguments.train_questions, arguments.validation_questions)
    with state.main_process_first():  # so that a download happens once per machine
        return parts.split(arguments.data_dir, arguments.unlike, arguments.seed)


def describe(labels: list[BlockPath], state: PartialState) -> None:
    """Prints how many paths the labels hold, and their mean length."""
    if state.is_main_process:
        layers = sum(map(sum, labels)) / len(labels)
        print(f"labels: {len(set(labels))} paths, {layers:.2f} layers on average", file=sys.stderr, flush=True)


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    arguments = parse_arguments(argv)
    state = process_state(datetime.timedelta(days=30))  # the others wait while the main process trains
    tokenizer = load_tokenizer(arguments.model, arguments.revision)
    routed = load_base(arguments, state)
    chat = arguments.reward == "generation" and wants_chat_template("auto", arguments.model, tokenizer)
    measured = arguments.measured_dir
    train = train_by_generation if arguments.reward == "generation" else train_by_likelihood
    try:
        trained = train(arguments, routed, tokenizer, measured, state)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was measured is in {measured}; run the same command to resume") from None
    if state.is_main_process:
        routed.cpu()
        # As after a search: eval.sh reads here whether prompts have the chat template.
        manifest = {
            "model": arguments.model,
            "revision": arguments.revision,
            "model_fingerprint": routed.config.base_model_fingerprint,
            "dtype": dtype_name(routed.dtype),
            "chat_template": chat,
            "reward": arguments.reward,
            "labels": len(trained.labels),
            "groups": trained.groups,
            "price": arguments.price if trained.price is None else trained.price,
            "arguments": {key: str(value) for key, value in vars(arguments).items()}
            | {"dataset": list(expand_sets(arguments.dataset))},  # eval.sh takes the tasks from here
            "versions": versions(),
            "commit": commit(),
        }
        save_checkpoint(routed, tokenizer, arguments.output_dir, manifest)
        print(f"wrote {arguments.output_dir}; {measured} keeps what was measured, for other prices and seeds")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
