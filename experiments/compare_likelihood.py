"""Compares routed checkpoints on multiple-choice test questions by log-likelihood, beside controls at equal layers.

    python -m experiments.compare_likelihood --model MODEL --checkpoint paper=checkpoints/published \
        --checkpoint "group paths=checkpoints/groups" --train_scores checkpoints/groups-measured \
        --output results/NAME.json

Checkpoints of one name are its seeds. Every method is scored on the same questions, by lm-eval's `acc`:

    base          every block once
    NAME          the routers of the checkpoints
    NAME, by set  the path of the question's set, with --by_set: what routers would do that always tell the set
    random: NAME  the actions of these routers at their own rates per layer, drawn regardless of the question
    static        one path for all, skips and repeats allowed, grown on the training questions of --train_scores, and
                  those of --static_paths
    influence     one path for all: the blocks with the least influence skipped (ShortGPT)
    early exit    one path for all: the last blocks skipped (LayerSkip's inference on a frozen base)

Sets weigh alike in the total of the first table. The probability of the right option among the options, which the
search maximises, tells smaller differences than the accuracy. Intervals are 95%, paired by question. Scores are kept in
--work_dir: run the same command to resume.
"""

from __future__ import annotations

import argparse
import datetime
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel

from drllm.arguments import MAX_SEED, check_ranges
from drllm.checkpoints import checkpoint_info, load_routed, load_routed_checkpoint, load_tokenizer
from drllm.errors import UserError, main_guard
from drllm.evaluation.experiment_figures import draw_methods
from drllm.evaluation.method_report import methods_table
from drllm.evaluation.outcomes import Outcome, method_row, paired_difference
from drllm.evaluation.protocol import LABELS
from drllm.files import check_output_file, check_output_folder, read_json
from drllm.group_paths.growth_arguments import add_growth_arguments, check_growth_arguments, growth_of
from drllm.group_paths.likelihood_paths import LikelihoodPaths
from drllm.group_paths.likelihood_rewards import LikelihoodRewards
from drllm.group_paths.parts import DEFAULT_TRAIN, Parts
from drllm.group_paths.paths import describe_edits, parse_edits, path_of_edits
from drllm.processes import process_state
from drllm.provenance import command_line, dtype_name, fingerprint, parse_dtype, write_result
from drllm.questions.likelihood import LikelihoodPrompt, require_choices
from drllm.questions.per_set import numbers_per_set
from drllm.questions.sets import Question, expand_sets, load_questions
from drllm.rivals import BlockInfluence, EarlyExit, random_paths
from drllm.rivals.routed import KeptDecisions
from drllm.rollouts.scores import ScoreStore
from train_models.paths import Path as BlockPath
from train_models.paths import default_path

PROGRAM = "python -m experiments.compare_likelihood"
CHUNK = 64  # questions whose decisions are kept in one file
CONTROLS = ("static", "influence", "early exit")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an argument out of range, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub name of the base model")
    add("--dtype", default="float32", help="of the base model (default: float32)")
    add("--checkpoint", action="append", default=[], help="NAME=FOLDER of a routed checkpoint; repeatable")
    add("--data_dir", type=Path, help="local question files in the Hub's schema; without it, the Hub")
    add("--sets", default="arc,openbookqa,commonsense", help="question sets and groups, comma-separated")
    add("--test_questions", type=int, help="per set; default: all")
    add("--questions", type=Path, help="JSON, set -> ids of training questions to test on; default: the test splits")
    add("--weights", help="weights of the sets, e.g. arc_easy=2376,openbookqa=500: differences for that mix, too")
    add("--controls", default="static,influence,early exit", help="static paths to compare with, comma-separated")
    add("--static_paths", default="", help='further ones, by their edits, e.g. "skip 19; skip 18, repeat 27"')
    add("--train_scores", type=Path, help="scores of experiments.group_paths, for the static paths; default: none")
    add("--train_questions", default=DEFAULT_TRAIN, help="as given to experiments.group_paths, like the next three")
    add("--train_seed", type=int, default=0, help="of the order of questions (default: 0)")
    add("--unlike", default="", help="sets whose test questions no training question repeats")
    add("--train_sets", help="sets of --train_scores; default: --sets")
    add_growth_arguments(parser)
    add("--price", type=float, default=0.01, help="reward that one block less may cost the static path")
    add("--random_seeds", type=int, default=3, help="most random counterparts per name (default: 3)")
    add("--by_set", choices=("also", "only"), help="follow the group paths by set, beside the routers or without them")
    add("--most_edits", type=int, default=4, help="of the static path, and skips of influence and early exit")
    add("--normalised", action="store_true", help="judge by acc_norm instead of acc")
    add("--batch_size", type=int, default=8, help="questions per forward pass (default: 8)")
    add("--work_dir", type=Path, default=Path("runs/compare_likelihood"), help="keeps all scores")
    add("--output", type=Path, required=True, help="JSON file; a .md and a .png are written beside it")
    arguments = parser.parse_args(argv)
    check_growth_arguments(arguments)
    check_ranges(
        arguments,
        batch_size=(1, math.inf),
        test_questions=(2, math.inf),
        **dict.fromkeys(("most_edits", "random_seeds"), (0, math.inf)),
        train_seed=(0, MAX_SEED),
        price=(-math.inf, math.inf),
    )
    for checkpoint in arguments.checkpoint:
        name, _, folder = checkpoint.partition("=")
        if not name or not folder:
            raise UserError(f"--checkpoint {checkpoint}: expected NAME=FOLDER")
        checkpoint_info(folder).require_routers()
    for sets in (arguments.sets, arguments.train_sets or arguments.sets):
        require_choices(expand_sets(sets))
    Parts.of(expand_sets(arguments.train_sets or arguments.sets), arguments.train_questions)
    numbers_per_set("--weights", arguments.weights or "none", expand_sets(arguments.sets), "none")
    arguments.controls = [name for name in arguments.controls.split(",") if name]
    if unknown := set(arguments.controls) - set(CONTROLS):
        raise UserError(f"--controls: {sorted(unknown)[0]!r} is not a control; choose from {', '.join(CONTROLS)}")
    arguments.static_paths = [edits.strip() for edits in arguments.static_paths.split(";") if edits.strip()]
    try:
        for edits in arguments.static_paths:
            parse_edits(edits)
    except ValueError as error:
        raise UserError(f"--static_paths: {error}") from None
    check_output_file(arguments.output, "--output")
    check_output_folder(arguments.work_dir, "--work_dir")
    if arguments.train_scores is not None:
        check_output_folder(arguments.train_scores, "--train_scores")
    parse_dtype(arguments.dtype)
    return arguments


class Comparison:
    """The base model, the test questions, and the outcomes of methods on them."""

    def __init__(self, arguments: argparse.Namespace, state: PartialState) -> None:
        self.arguments = arguments
        self.state = state
        self.sets = expand_sets(arguments.sets)
        self.tokenizer = load_tokenizer(arguments.model)
        self.routed = load_routed(arguments.model, parse_dtype(arguments.dtype), None, {}).eval().to(state.device)
        self.num_blocks = self.routed.config.num_hidden_layers
        self.key = {"model_fingerprint": fingerprint(self.routed), "dtype": dtype_name(self.routed.dtype)}
        questions = [
            question
            for name in self.sets
            for question in test_questions(name, arguments.data_dir, arguments.questions)[: arguments.test_questions]
        ]
        self.prompts = [LikelihoodPrompt.of(question, self.tokenizer) for question in questions]
        store = ScoreStore(arguments.work_dir / "test", self.key, state.process_index)
        self.rewards = self._rewards(self.prompts, store)
        self.default = [default_path(self.num_blocks)] * len(self.prompts)

    def _rewards(self, prompts: list[LikelihoodPrompt], store: ScoreStore) -> LikelihoodRewards:
        arguments = self.arguments
        return LikelihoodRewards(self.routed, prompts, store, self.state, arguments.batch_size, arguments.normalised)

    def score(self, methods: Sequence[Sequence[BlockPath]]) -> None:
        """Scores the test questions along the paths of all methods, so that a question's paths share their blocks."""
        self.rewards.score([list(paths) for paths in zip(*methods, strict=True)], "test questions")

    def along(self, name: str, paths: Sequence[BlockPath]) -> Outcome:
        """The outcome of one scored path per test question, reported on stderr."""
        right = [float(self.rewards.is_right(prompt, path)) for prompt, path in zip(self.prompts, paths, strict=True)]
        outcome = Outcome(right, [float(sum(path)) for path in paths])
        if self.state.is_main_process:
            print(f"{name}: {outcome.accuracy:.2%} at {outcome.mean_layers:.2f} layers", file=sys.stderr, flush=True)
        return outcome

    def probability(self, several: Sequence[Sequence[BlockPath]]) -> dict[str, float]:
        """What paths do to the probability of the right option: points against the base, with their 95% interval.

        Args:
            several: paths of the test questions, scored, once per seed.
        """

        def outcome(paths: Sequence[BlockPath]) -> Outcome:
            pairs = zip(self.prompts, paths, strict=True)
            return Outcome([self.rewards.reward(*pair) for pair in pairs], [float(sum(path)) for path in paths])

        return paired_difference(Outcome.average([outcome(paths) for paths in several]), outcome(self.default))

    def decisions(self, checkpoint: str) -> list[BlockPath]:
        """The paths that the routers of a checkpoint decide on for the test questions; every process calls this.

        They are kept in --work_dir.

        Raises:
            UserError: the checkpoint has another base model.
        """
        model: PreTrainedModel = load_routed_checkpoint(checkpoint, self.arguments.dtype, self.state.device)
        if (found := fingerprint(model)) != self.key["model_fingerprint"]:
            raise UserError(
                f"{checkpoint} has base weights {found}, --model has {self.key['model_fingerprint']}; name the base "
                "that the checkpoint was trained on"
            )
        kept = KeptDecisions(model, self.arguments.work_dir / "decisions", self.arguments.batch_size)
        chunks = [self.prompts[start : start + CHUNK] for start in range(0, len(self.prompts), CHUNK)]
        mine = range(self.state.process_index, len(chunks), self.state.num_processes)
        is_hidden = not self.state.is_main_process
        bar = tqdm(mine, desc=f"decisions of {checkpoint}", unit=f"x {CHUNK} questions", disable=is_hidden)
        own = {number: kept.paths(chunks[number], kept.own_control) for number in bar}
        decided = {number: paths for share in gather_object([own]) for number, paths in share.items()}
        return [path for number in range(len(chunks)) for path in decided[number]]

    def by_set(self, checkpoint: str) -> list[BlockPath] | None:
        """The path of each test question's set that the routers of a checkpoint were trained to follow.

        None for a checkpoint without group paths.

        Raises:
            UserError: the group paths leave out one of the sets.
        """
        file = Path(checkpoint) / LABELS
        manifest = read_json(file, "pass an undamaged checkpoint") if file.exists() else {}
        if not manifest.get("groups"):
            return None
        price = float(manifest.get("price", manifest["arguments"]["price"]))
        paths = {}
        for group in manifest["groups"]:
            best = max(group["chain"], key=lambda member: member["reward"] - price * member["layers"])
            paths |= dict.fromkeys(group["questions"], path_of_edits(best["edits"], self.num_blocks))
        if missing := set(self.sets) - paths.keys():
            raise UserError(f"--by_set: {checkpoint} has no path of the set {sorted(missing)[0]}")
        return [paths[prompt.question.set] for prompt in self.prompts]

    def static_paths(self) -> list[BlockPath]:
        """The paths of 0, 1, ... edits that one group of all training questions grows."""
        arguments = self.arguments
        parts = Parts.of(expand_sets(arguments.train_sets or arguments.sets), arguments.train_questions)
        training = [
            LikelihoodPrompt.of(question, self.tokenizer)
            for train, _ in parts.split(arguments.data_dir, arguments.unlike, arguments.train_seed).values()
            for question in train
        ]
        shared = {prompt.question.id for prompt in training} & {prompt.question.id for prompt in self.prompts}
        if shared:
            raise UserError(f"{len(shared)} test questions are also training questions, e.g. {sorted(shared)[0]}")
        store = ScoreStore(arguments.train_scores, self.key, self.state.process_index)
        growth = growth_of(arguments, arguments.most_edits)
        one_group = torch.zeros(len(training), dtype=torch.long)
        (chain,) = LikelihoodPaths(self._rewards(training, store), one_group, growth).chains
        return [member.path for member in chain]

    def controls(self) -> dict[str, list[BlockPath]]:
        """Static paths by name."""
        contexts = [_Context(prompt) for prompt in self.prompts]
        most = self.arguments.most_edits
        try:
            paths = {"static": [path_of_edits(edits, self.num_blocks) for edits in self.arguments.static_paths]}
        except ValueError as error:
            raise UserError(f"--static_paths: {error}") from None
        for kind in self.arguments.controls:
            if kind == "static":
                paths[kind] += self.static_paths()[1:] if self.arguments.train_scores else []
            else:
                rival = EarlyExit() if kind == "early exit" else BlockInfluence(self.arguments.batch_size)
                paths[kind] = rival.fit(self.routed, contexts, most)[1:]
        return {
            f"{kind}: {describe_edits(path)}" if kind == "static" else f"{kind}: {sum(path)} blocks": [path]
            for kind, members in paths.items()
            for path in members
        }

    def differences(self, outcome: Outcome, reference: Outcome) -> dict[str, dict[str, float]]:
        """Paired differences per set, over all questions ("all"), and for the mix of --weights ("mix"), in points."""
        table = {}
        for name in self.sets:
            members = [i for i, prompt in enumerate(self.prompts) if prompt.question.set == name]
            pair = [Outcome([one.right[i] for i in members], [0.0] * len(members)) for one in (outcome, reference)]
            table[name] = paired_difference(*pair)
        weights = numbers_per_set("--weights", self.arguments.weights or "none", self.sets, "none")
        result = table | {"all": paired_difference(outcome, reference)}
        if weights:
            shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
            points = sum(share * table[name]["points"] for name, share in shares.items())
            half = math.hypot(
                *(share * (table[name]["high"] - table[name]["points"]) for name, share in shares.items())
            )
            result["mix"] = {"points": points, "low": points - half, "high": points + half}
        return result

    def per_set(self, outcome: Outcome) -> dict[str, dict[str, float]]:
        """Accuracy and layers of each set, and of all sets, which weigh alike."""
        table = {}
        for name in self.sets:
            members = [i for i, prompt in enumerate(self.prompts) if prompt.question.set == name]
            table[name] = {
                "accuracy": statistics.mean(outcome.right[i] for i in members),
                "layers": statistics.mean(outcome.layers[i] for i in members),
                "questions": len(members),
            }
        return table | {
            "total": {
                column: statistics.mean(table[name][column] for name in self.sets) for column in ("accuracy", "layers")
            }
        }


def test_questions(name: str, data_dir: Path | None, listed: Path | None) -> list[Question]:
    """The test questions of a set: its test split, or the training questions that the file `listed` names.

    Raises:
        UserError: see `load_questions`; and if the file is damaged or names a question that does not exist.
    """
    if listed is None:
        return load_questions(name, "test", data_dir)
    hint = "write set -> ids, as experiments.fresh_questions does"
    wanted = read_json(listed, hint).get(name)
    if not isinstance(wanted, list) or not wanted or not all(isinstance(one, str) for one in wanted):
        raise UserError(f"--questions {listed}: no list of ids of {name}; {hint}, or leave it out of --sets")
    chosen = [question for question in load_questions(name, "train", data_dir) if question.id in set(wanted)]
    if missing := set(wanted) - {question.id for question in chosen}:
        raise UserError(f"--questions {listed}: {name} has no question {sorted(missing)[0]!r}")
    return chosen


class _Context:
    """What `BlockInfluence` reads of a question: its prompt."""

    def __init__(self, prompt: LikelihoodPrompt) -> None:
        self.prompt = prompt


def compare(arguments: argparse.Namespace, state: PartialState) -> dict:
    """Everything that the JSON holds but its provenance."""
    comparison = Comparison(arguments, state)
    methods: dict[str, list[list[BlockPath]]] = {}
    followed: dict[str, list[list[BlockPath]]] = {}
    for checkpoint in arguments.checkpoint:
        name, _, folder = checkpoint.partition("=")
        if arguments.by_set != "only":
            methods.setdefault(name, []).append(comparison.decisions(folder))
        if arguments.by_set is not None and (paths := comparison.by_set(folder)) is not None:
            followed[f"{name}, by set"] = [paths]  # the same for all seeds
    if arguments.by_set is not None and not followed:
        raise UserError("--by_set: no checkpoint has group paths; pass one of experiments.group_paths")
    routed_names = list(methods)
    for name in routed_names if arguments.random_seeds else ():
        routed = methods[name][: arguments.random_seeds]
        methods[f"random: rates of {name}"] = [random_paths(paths, seed) for seed, paths in enumerate(routed)]
    controls = comparison.controls()
    methods |= followed
    methods |= {name: [[path] * len(comparison.prompts)] for name, (path,) in controls.items()}
    comparison.score([comparison.default, *(paths for seeds in methods.values() for paths in seeds)])
    base = comparison.along("base", comparison.default)
    outcomes = {"base": [base]}
    for name, seeds in methods.items():
        outcomes[name] = [
            comparison.along(f"{name}, seed {seed}" if len(seeds) > 1 else name, paths)
            for seed, paths in enumerate(seeds)
        ]
    static = [base, *(found[0] for name, found in outcomes.items() if name.startswith("static"))]
    return {
        "test_questions": len(comparison.prompts),
        "metric": "acc_norm" if arguments.normalised else "acc",
        "base": comparison.key,
        "rows": [
            method_row(name, found, base, static)
            | {"probability": comparison.probability(methods.get(name, [comparison.default]))}
            for name, found in outcomes.items()
        ],
        "sets": {name: comparison.per_set(Outcome.average(found)) for name, found in outcomes.items()},
        "differences": {
            f"{name} - {other}": comparison.differences(Outcome.average(found), Outcome.average(outcomes[other]))
            for name, found in outcomes.items()
            for other in outcomes
            if other == "base" != name or (name in routed_names and (other not in routed_names or other < name))
        },
        "paths": {name: list(path) for name, (path,) in controls.items()},
        "oracle": None,
    }


def sets_table(result: dict) -> str:
    """Accuracy and layers by set as Markdown; in the total the sets weigh alike."""
    names = list(next(iter(result["sets"].values())))
    lines = [
        "| method | " + " | ".join(f"{name} acc. (%) | layers" for name in names) + " |",
        "|---" * (2 * len(names) + 1) + "|",
    ]
    for method, by_set in result["sets"].items():
        cells = [f"{100 * by_set[name]['accuracy']:.2f} | {by_set[name]['layers']:.2f}" for name in names]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences_table(result: dict) -> str:
    """Paired differences in accuracy by set as Markdown, with 95% intervals."""
    names = list(next(iter(result["differences"].values()), {}))
    lines = ["| points | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for pair, by_set in result["differences"].items():
        cells = ["{points:+.2f} [{low:+.2f}, {high:+.2f}]".format(**by_set[name]) for name in names]
        lines.append(f"| {pair} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    arguments = parse_arguments(argv)
    start = time.perf_counter()
    state = process_state(datetime.timedelta(days=1))
    result = compare(arguments, state)
    if state.is_main_process:
        write_result(
            arguments.output,
            result,
            command=command_line(PROGRAM, argv),
            seed=arguments.train_seed,
            seconds=time.perf_counter() - start,
            table=f"{sets_table(result)}\n\n{methods_table(result)}\n\n{differences_table(result)}",
        )
        draw_methods(result, arguments.output.with_suffix(".png"))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
