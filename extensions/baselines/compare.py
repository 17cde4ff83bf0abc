"""Compares methods that save or repeat blocks on one frozen base, on the same test questions.

    python -m extensions.baselines.compare --checkpoint "as published=checkpoints/drllm" --skips 2 \
        --output results/NAME.json

Every method answers the same questions, graded and counted alike, in the way that the checkpoints' labels were made
(model, dtype, reward, prompts); without a checkpoint --model, --dtype and --reward say so:

    base          every block once
    NAME          the routers of the checkpoints NAME=FOLDER; those of one name are its seeds
    random: NAME  random decisions, at the rates per block of these routers, regardless of the question
    NAME, knob    these routers with the knob of Appendix B set on training questions so that --skips blocks are saved
    static        one path for all: blocks skipped one after the other, each the one that costs the training questions
                  least, and the paths of --static_paths
    shortgpt      one path for all: the blocks that change their input least are skipped
    layerskip     one path for all: the last blocks are skipped (LayerSkip's inference on a frozen base)
    mindskip      a linear router per block decides once per prompt (Router-Tuning)
    flexidepth    a router and an adapter per block decide per token
    random        blocks drawn uniformly for each question
    ceiling       search with the test question's gold answer, on 20 questions per set
    known paths   with --known_paths: the path that the base was trained along for questions of that kind; every row
                  then has the share of their gain that its method recovers

Methods are compared question by question with the base, and with static paths of as many layers: between two static
paths, the mixture that has as many. Intervals are 95%, over questions, of answers averaged over seeds. Where responses
are generated, a table has the share of them that hold an answer to grade, and the accuracy among those. Everything that
was measured is kept in --work_dir: run the same command to resume.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from drllm.arguments import MAX_SEED, add_shared, check_ranges
from drllm.checkpoints import load_routed_checkpoint
from drllm.edits import describe_edits, parse_paths, paths_of_edits
from drllm.errors import UserError, main_guard
from drllm.files import check_output_file, check_output_folder
from drllm.paper.experiment_figures import draw_methods
from drllm.processes import process_state
from drllm.provenance import command_line, fingerprint, write_result
from drllm.questions.per_set import numbers_per_set
from drllm.rollouts.scores import ScoreStore
from extensions.baselines.bench import by_set
from extensions.baselines.ceiling import NAME as CEILING
from extensions.baselines.ceiling import ceiling
from extensions.baselines.flexidepth import FlexiDepth
from extensions.baselines.interface import Baseline, Cost, fit_once
from extensions.baselines.known_paths import known_paths
from extensions.baselines.mindskip import MindSkip
from extensions.baselines.outcomes import Outcome, differences_by_set, method_row, share_recovered
from extensions.baselines.protocol import Protocol, add_protocol_arguments, check_protocol_arguments, load_parts
from extensions.baselines.report import tables
from extensions.baselines.routed import control_at, random_paths, random_skips, routing_cost
from extensions.baselines.static_paths import BlockInfluence, EarlyExit, GreedySkips, path_of
from train_models.paths import Path as BlockPath

PROGRAM = "python -m extensions.baselines.compare"
FITTED: dict[str, Baseline] = {
    "shortgpt": BlockInfluence(),
    "layerskip": EarlyExit(),
    "mindskip": MindSkip(),
    "flexidepth": FlexiDepth(),
}
SEEDED = ("mindskip", "flexidepth")
METHODS = ("static", *FITTED, "knob", "random", "ceiling")
CONTROL_QUESTIONS = 96  # training questions on which the knob is set
RANDOM_SEEDS = 3  # most drawings at a method's rates
CEILING_QUESTIONS = 20  # per set: each costs a search


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an argument out of range, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_protocol_arguments(parser, train_questions=120)
    add("--methods", default="static,shortgpt,layerskip", help=f"some of {','.join(METHODS)} (default: %(default)s)")
    add("--skips", type=int, default=1, help="blocks to save on average: the budget (default: 1)")
    add("--static_paths", default="", help='further static paths, by edits: "skip 19; skip 18, repeat 27"')
    add("--known_paths", type=Path, help="JSON, kind of question -> path, of a base trained along known paths")
    add("--weights", default="", help="weights of the sets in a mix, e.g. arc_easy=2376,openbookqa=500")
    add("--seeds", type=int, default=1, help="trainings of mindskip and flexidepth, drawings of random (default: 1)")
    add_shared(parser, "seed", 0, about=": the first of these, and that of the order of questions")
    add_shared(parser, "batch_size", 16)
    add_shared(parser, "work_dir", Path("out/compare/work"))
    add_shared(parser, "output", required=True)
    arguments = parser.parse_args(argv)
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    check_ranges(
        arguments,
        **dict.fromkeys(("seeds", "batch_size"), (1, math.inf)),
        skips=(0, math.inf),
        seed=(0, MAX_SEED),
    )
    check_protocol_arguments(arguments)
    arguments.methods = [name for name in arguments.methods.split(",") if name]
    if unknown := set(arguments.methods) - set(METHODS):
        raise UserError(f"--methods: {sorted(unknown)[0]!r} is not a method; choose from {', '.join(METHODS)}")
    arguments.static_paths = parse_paths("--static_paths", arguments.static_paths)
    for output in (arguments.output, arguments.output.with_suffix(".md"), arguments.output.with_suffix(".png")):
        check_output_file(output, "--output")
    check_output_folder(arguments.work_dir, "--work_dir")


class MethodTable:
    """The bench, and the rows of the table as they are finished."""

    def __init__(self, arguments: argparse.Namespace, protocol: Protocol, state: PartialState) -> None:
        self.arguments = arguments
        self.weights = numbers_per_set("--weights", arguments.weights, protocol.sets, "")
        questions = load_parts(arguments, protocol)
        self.bench = protocol.bench(questions, arguments.work_dir, arguments.batch_size, state.device)
        if arguments.skips >= self.bench.num_blocks:
            raise UserError(f"--skips {arguments.skips}: the model has only {self.bench.num_blocks} blocks")
        self.static_paths = paths_of_edits("--static_paths", arguments.static_paths, self.bench.num_blocks)
        self.controls = [self.bench.base]  # static paths
        self.known: Outcome | None = None
        if arguments.known_paths is not None:
            asked = [prompt.question for prompt in self.bench.prompts]
            paths = known_paths(arguments.known_paths, protocol.data_dir, self.bench.num_blocks, asked)
            self.known = self.bench.along(paths, "known paths")
        self.rows: list[dict] = []
        self.outcomes: dict[str, Outcome] = {}  # of all test questions, by method

    def add(self, name: str, outcomes: Sequence[Outcome], cost: Cost | None = None, **about) -> None:
        """Appends a row, and reports it on stderr.

        Args:
            about: `paths`, one list per outcome; `places`, the test questions of the outcomes, where they are not all;
                `base`, on the same questions.
        """
        bench, paths, places = self.bench, about.get("paths"), about.get("places")
        average = Outcome.average(outcomes)
        row = method_row(name, outcomes, about.get("base", bench.base), [] if places else self.controls)
        row["sets"] = bench.per_set(average, places)
        row["mean_of_sets"] = sum(values["accuracy"] for values in row["sets"].values()) / len(row["sets"])
        row["questions"] = len(average.right)
        row["cost"] = None if cost is None else vars(cost)
        every = [path for of_seed in paths or () for path in of_seed]
        row["default_share"] = sum(path == bench.default[0] for path in every) / len(every) if every else None
        if self.known is not None and places is None:
            row["recovered"] = share_recovered(average, bench.base, self.known)
        if places is None:
            self.outcomes[name] = average
        self.rows.append(row)
        if bench.state.is_main_process:
            print(f"{name}: {row['accuracy']:.2%} at {row['layers']:.2f} layers", file=sys.stderr, flush=True)

    def along(self, name: str, several: Sequence[Sequence[BlockPath]], cost: Cost | None = None) -> None:
        """The row of a method with known paths, once per seed."""
        outcomes = [self.bench.along(paths, name) for paths in several]
        self.add(name, outcomes, cost, paths=several)

    def static(self) -> None:
        """The rows of all paths that are the same for every question; the mixtures of other rows are between them."""
        arguments, bench = self.arguments, self.bench
        named: list[tuple[str, BlockPath, Cost | None]] = []
        if "static" in arguments.methods:
            for skips in range(1, arguments.skips + 1):
                fitted, cost = fit_once(GreedySkips(), bench, skips, arguments.seed)
                named.append((f"static: {describe_edits(path_of(fitted))}", path_of(fitted), cost))
        named += [(f"static: {describe_edits(path)}", path, None) for path in self.static_paths]
        bench.score([[path for _, path, _ in named]] * len(bench.prompts), "static paths")
        for name, path, cost in named:
            self.controls.append(bench.along([path] * len(bench.prompts)))
            self.add(name, self.controls[-1:], cost, paths=[[path] * len(bench.prompts)])

    def fitted(self) -> None:
        """The rows of the baselines that are fitted to the budget on training questions."""
        arguments, bench = self.arguments, self.bench
        for name in [name for name in FITTED if name in arguments.methods]:
            seeds = range(arguments.seed, arguments.seed + (arguments.seeds if name in SEEDED else 1))
            baseline, fitted = FITTED[name], [fit_once(FITTED[name], bench, arguments.skips, seed) for seed in seeds]
            cost = Cost(fitted[0][1].parameters, sum(cost.seconds or 0 for _, cost in fitted) / len(fitted))
            self.add(baseline.name, [baseline.outcome(bench, tensors) for tensors, _ in fitted], cost)

    def checkpoints(self) -> None:
        """The rows of each named checkpoint: as it is, with the knob at the budget if wanted, random at its rates."""
        names: dict[str, list[str]] = {}
        for checkpoint in self.arguments.checkpoint:
            name, _, folder = checkpoint.partition("=")
            names.setdefault(name, []).append(folder)
        for name, folders in names.items():
            bench, knobs, as_they_are, at_budget, cost = self.bench, [], [], [], None
            for folder in folders:
                routed = self._load(folder)
                cost = routing_cost(routed, Path(folder))
                as_they_are.append(bench.decisions(routed, bench.prompts))
                if "knob" in self.arguments.methods:
                    some = bench.training[:: max(1, len(bench.training) // CONTROL_QUESTIONS)]
                    layers = bench.num_blocks - self.arguments.skips
                    knobs.append(control_at(bench, routed, layers, [answered.prompt for answered in some]))
                    at_budget.append(bench.decisions(routed, bench.prompts, knobs[-1]))
            self.along(name, as_they_are, cost)
            if knobs:
                self.along(f"{name}, knob {sum(knobs) / len(knobs):.3f}", at_budget, cost)
            drawn = [random_paths(paths, seed) for seed, paths in enumerate(as_they_are[:RANDOM_SEEDS])]
            self.along(f"random decisions, at the rates of {name}", drawn)

    def _load(self, folder: str):
        routed = load_routed_checkpoint(folder, self.bench.key["dtype"], self.bench.routed.device)
        if (found := fingerprint(routed)) != self.bench.key["model_fingerprint"]:
            raise UserError(
                f"{folder} has base weights {found}, the base model has {self.bench.key['model_fingerprint']}; name "
                "the base that the checkpoint was trained on with --model"
            )
        return routed

    def random(self) -> None:
        """The row of uniformly drawn skips."""
        arguments, bench = self.arguments, self.bench
        seeds = range(arguments.seed, arguments.seed + arguments.seeds)
        drawn = [random_skips(bench.num_blocks, arguments.skips, len(bench.prompts), seed) for seed in seeds]
        self.along("random skips", drawn)

    def ceiling(self) -> None:
        """The rows of the search with the test questions' answers, and of the base on the same questions."""
        bench = self.bench
        places = [place for of_set in by_set(bench.prompts).values() for place in of_set[:CEILING_QUESTIONS]]
        prompts = [bench.prompts[place] for place in places]
        base = bench.base.of(places)
        store = ScoreStore(bench.folder / "ceiling", bench.key | {"seed": self.arguments.seed})
        self.add("base, on the ceiling's questions", [base], places=places, base=base)
        self.add(CEILING, [ceiling(bench.engine, prompts, store, self.arguments.seed)], places=places, base=base)

    def differences(self) -> dict[str, dict[str, dict[str, float]]]:
        """Each named checkpoint against the base and every other method: paired, by set and for the mix."""
        places = by_set(self.bench.prompts)
        named = dict.fromkeys(checkpoint.partition("=")[0] for checkpoint in self.arguments.checkpoint)
        return {
            f"{name} - {other}": differences_by_set(self.outcomes[name], reference, places, self.weights)
            for name in named
            for other, reference in self.outcomes.items()
            if other != name
        }


def compare(arguments: argparse.Namespace, state: PartialState) -> dict:
    """Everything that the JSON holds but its provenance."""
    protocol = Protocol.of(arguments, state)
    comparison = MethodTable(arguments, protocol, state)
    bench = comparison.bench
    comparison.add("base", [bench.base], Cost(), paths=[bench.default])
    comparison.static()
    comparison.fitted()
    comparison.checkpoints()
    if comparison.known is not None:
        comparison.add("known paths", [comparison.known])
    if "random" in arguments.methods:
        comparison.random()
    if "ceiling" in arguments.methods:
        comparison.ceiling()
    return {
        "base": bench.key,
        "blocks": bench.num_blocks,
        "has_options": bench.reward.has_options,
        "skips": arguments.skips,
        "training_questions": len(bench.training),
        "test_questions": len(bench.prompts),
        "rows": comparison.rows,
        "differences": comparison.differences(),
    }


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
            seed=arguments.seed,
            seconds=time.perf_counter() - start,
            table=tables(result),
        )
        draw_methods(result, arguments.output.with_suffix(".png"))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
