"""Compares Dr.LLM with its rivals on one frozen base, at one layer budget: Table 5 in the paper's form.

    python -m experiments.rivals --skips 1 --checkpoint published=checkpoints/published \
        --checkpoint "group paths=checkpoints/groups" --output results/rivals/miniature.json
    python -m experiments.rivals --reward likelihood --model MODEL --sets arc,openbookqa,commonsense --skips 4 \
        --output results/rivals/NAME.json

Every method is fitted on the same training questions, saves --skips blocks on average, and answers the same test
questions, block applications counted:

    base          every block once
    shortgpt      one path: the blocks that change their input least are skipped
    layerskip     one path: the last blocks are skipped (LayerSkip's inference on a frozen base)
    mindskip      a linear router per block decides once per prompt (Router-Tuning)
    flexidepth    a router and an adapter per block decide per token
    cola          search with the test question's gold answer: a ceiling, on --ceiling_questions per set
    random        blocks drawn uniformly for each question
    NAME          routers of a checkpoint: as they are (with random decisions at their rates), and with the knob of
                  Appendix B set to the budget on training questions

Checkpoints of one name are its seeds. Scores and fitted rivals are kept in --work_dir: run the same command to resume.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from drllm.arguments import MAX_SEED, check_ranges
from drllm.checkpoints import load_routed, load_routed_checkpoint, load_tokenizer
from drllm.errors import UserError, main_guard
from drllm.evaluation.outcomes import Outcome
from drllm.files import check_output_file, check_output_folder
from drllm.group_paths.parts import Parts
from drllm.miniature import MINIATURE_DATA, MINIATURE_MODEL
from drllm.provenance import command_line, fingerprint, parse_dtype, write_result
from drllm.questions.sets import expand_sets, load_questions
from drllm.rivals import (
    BENCHES,
    CoLa,
    Cost,
    FlexiDepth,
    GateTraining,
    MindSkip,
    Rival,
    fit_once,
    layer_skip,
    random_paths,
    short_gpt,
)
from drllm.rivals.routed import KeptDecisions, random_skips, routing_cost
from drllm.rivals.table import table5, table_row
from train_models.paths import default_path

PROGRAM = "python -m experiments.rivals"
FITTED = ("shortgpt", "layerskip", "mindskip", "flexidepth")
METHODS = (*FITTED, "cola", "random")
CONTROL_QUESTIONS = 96  # training questions on which the knob is set


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an argument out of range, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(MINIATURE_MODEL), help="folder or Hub name of the base model; default: the miniature")
    add("--dtype", default="float32", help="of the base model (default: float32)")
    add("--data_dir", type=Path, help="question files in the Hub's schema; default: the miniature's, or the Hub")
    add("--sets", default="arc,dart", help="question sets and groups, comma-separated")
    add("--reward", choices=sorted(BENCHES), default="generation", help="what counts as a right answer")
    add("--skips", type=int, default=1, help="blocks to save on average: the budget")
    add("--methods", default=",".join(METHODS), help="comma-separated; default: all")
    add("--checkpoint", action="append", default=[], help="NAME=FOLDER of a routed checkpoint; repeatable")
    add("--train_questions", type=int, default=120, help="per set, the first of the seed's order (default: 120)")
    add("--unlike", default="", help="sets whose test questions no training question repeats; default: not checked")
    add("--test_questions", type=int, help="per set; default: all")
    add("--ceiling_questions", type=int, default=20, help="test questions per set for cola (default: 20)")
    add(
        "--seeds", type=int, default=1, help="trainings of mindskip and flexidepth, and drawings of random (default: 1)"
    )
    add("--seed", type=int, default=0, help="the first of them; also of the order of training questions")
    add("--epochs", type=int, default=6, help="of mindskip and flexidepth (default: 6)")
    add("--train_batch_size", type=int, default=16, help="of mindskip and flexidepth (default: 16)")
    add("--batch_size", type=int, default=16, help="questions per forward pass (default: 16)")
    add("--work_dir", type=Path, default=Path("runs/rivals"), help="keeps all scores and fitted rivals")
    add("--output", type=Path, required=True, help="JSON file; a .md is written beside it")
    arguments = parser.parse_args(argv)
    check_ranges(
        arguments,
        **dict.fromkeys(("train_questions", "seeds", "epochs", "train_batch_size", "batch_size"), (1, math.inf)),
        skips=(0, math.inf),
        ceiling_questions=(2, math.inf),
        test_questions=(2, math.inf),
        seed=(0, MAX_SEED),
    )
    for checkpoint in arguments.checkpoint:
        if not all(checkpoint.partition("=")[::2]):
            raise UserError(f"--checkpoint {checkpoint}: expected NAME=FOLDER")
    arguments.methods = [name for name in arguments.methods.split(",") if name]
    if unknown := set(arguments.methods) - set(METHODS):
        raise UserError(f"--methods: {sorted(unknown)[0]!r} is not a method; choose from {', '.join(METHODS)}")
    if arguments.data_dir is None and arguments.model == str(MINIATURE_MODEL):
        arguments.data_dir = MINIATURE_DATA
    if arguments.unlike:
        expand_sets(arguments.unlike)
    check_output_file(arguments.output, "--output")
    check_output_folder(arguments.work_dir, "--work_dir")
    parse_dtype(arguments.dtype)
    return arguments


class Comparison:
    """The bench, and the rows of the table as they are finished."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        sets = expand_sets(arguments.sets)
        tokenizer = load_tokenizer(arguments.model)
        self.routed = load_routed(arguments.model, parse_dtype(arguments.dtype), None, {}).eval()
        self.num_blocks = self.routed.config.num_hidden_layers
        if arguments.skips >= self.num_blocks:
            raise UserError(f"--skips {arguments.skips}: the model has only {self.num_blocks} blocks")
        parts = Parts.of(sets, str(arguments.train_questions))
        train = [
            question
            for of_set, _ in parts.split(arguments.data_dir, arguments.unlike, arguments.seed).values()
            for question in of_set
        ]
        test = [
            question
            for name in sets
            for question in load_questions(name, "test", arguments.data_dir)[: arguments.test_questions]
        ]
        bench_type = BENCHES[arguments.reward]
        self.bench = bench_type(
            self.routed, tokenizer, train, test, arguments.work_dir / arguments.reward, arguments.batch_size
        )
        self.seeds = range(arguments.seed, arguments.seed + arguments.seeds)
        self.rows: list[dict] = []
        self.base = self.bench.along("base", [default_path(self.num_blocks)] * len(test))
        self.add("base", [self.base], Cost())

    def add(self, name: str, outcomes: Sequence[Outcome], cost: Cost | None, base: Outcome | None = None) -> None:
        """Appends a row, and reports it on stderr. `base`: where fewer questions than the test's are meant."""
        base = base or self.base
        kept = self._first() if base is not self.base else range(len(base.right))
        row = table_row(name, outcomes, base, [self.bench.prompts[index] for index in kept], cost)
        self.rows.append(row)
        print(f"{name}: {row['accuracy']:.2%} at {row['layers']:.2f} layers", file=sys.stderr, flush=True)

    def fitted(self, rival: Rival, seeds: Sequence[int]) -> None:
        """The row of a rival that is fitted on the training questions."""
        bench, arguments = self.bench, self.arguments
        folder = arguments.work_dir / "fitted"
        fitted = [fit_once(rival, self.routed, bench.training, arguments.skips, seed, folder) for seed in seeds]
        costs = [member.cost for member in fitted]
        cost = Cost(costs[0].parameters, sum(cost.seconds for cost in costs) / len(costs), costs[0].changes_base)
        self.add(rival.name, [member.outcome(bench) for member in fitted], cost)

    def fitted_rivals(self) -> None:
        """The rows of all rivals that --methods names."""
        arguments = self.arguments
        epochs, batch_size = arguments.epochs, arguments.train_batch_size
        first = [arguments.seed]
        for name in [name for name in FITTED if name in arguments.methods]:
            if name == "shortgpt":
                self.fitted(short_gpt(), first)
            elif name == "layerskip":
                self.fitted(layer_skip(), first)
            elif name == "mindskip":
                self.fitted(MindSkip(GateTraining(epochs, batch_size)), self.seeds)
            else:
                self.fitted(FlexiDepth(GateTraining(epochs, batch_size, gain=10.0)), self.seeds)

    def checkpoints(self) -> None:
        """The rows of each named checkpoint: as it is, random at its rates, with the knob at the budget."""
        names: dict[str, list[str]] = {}
        for checkpoint in self.arguments.checkpoint:
            name, _, folder = checkpoint.partition("=")
            names.setdefault(name, []).append(folder)
        for name, folders in names.items():
            self._checkpoint(f"Dr.LLM {name}", folders)

    def _checkpoint(self, name: str, folders: Sequence[str]) -> None:
        bench = self.bench
        layers = self.num_blocks - self.arguments.skips
        some = bench.training[:: max(1, len(bench.training) // CONTROL_QUESTIONS)]
        as_it_is, at_random, at_budget, controls, cost = [], [], [], [], None
        for seed, folder in enumerate(folders):
            decisions = self._decisions(folder)
            cost = routing_cost(decisions.routed, Path(folder))
            paths = decisions.paths(bench.prompts, decisions.own_control)
            as_it_is.append(bench.along(name, paths))
            at_random.append(bench.along(f"random: {name}", random_paths(paths, seed)))
            controls.append(decisions.control_at(layers, [question.prompt for question in some]))
            at_budget.append(bench.along(f"{name}, knob", decisions.paths(bench.prompts, controls[-1])))
        self.add(name, as_it_is, cost)
        self.add(f"{name}, knob {sum(controls) / len(controls):.3f}", at_budget, cost)
        self.add(f"random, rates of {name}", at_random, Cost())

    def _decisions(self, folder: str) -> KeptDecisions:
        model = load_routed_checkpoint(folder, self.arguments.dtype, self.routed.device)
        if (found := fingerprint(model)) != self.bench.key["model_fingerprint"]:
            raise UserError(
                f"{folder} has base weights {found}, --model has {self.bench.key['model_fingerprint']}; name the base "
                "that the checkpoint was trained on"
            )
        return KeptDecisions(model, self.arguments.work_dir / "decisions", self.arguments.batch_size)

    def random(self) -> None:
        """The row of uniformly drawn skips."""
        drawn = [random_skips(self.num_blocks, self.arguments.skips, len(self.bench.prompts), s) for s in self.seeds]
        self.add("random skips", [self.bench.along("random skips", paths) for paths in drawn], Cost())

    def ceiling(self) -> None:
        """The row of the search with the test questions' answers, on the first questions of each set."""
        chosen = self._first()
        prompts = [self.bench.prompts[index] for index in chosen]
        base = Outcome([self.base.right[i] for i in chosen], [self.base.layers[i] for i in chosen])
        cola = CoLa()
        outcome = self.bench.ceiling(cola, prompts, self.arguments.seed)
        self.add("base, the ceiling's questions", [base], Cost(), base)
        self.add(cola.name, [outcome], Cost(), base)

    def _first(self) -> list[int]:
        """Places of the first --ceiling_questions of each set."""
        seen: dict[str, int] = {}
        chosen = []
        for index, prompt in enumerate(self.bench.prompts):
            seen[prompt.question.set] = seen.get(prompt.question.set, 0) + 1
            if seen[prompt.question.set] <= self.arguments.ceiling_questions:
                chosen.append(index)
        return chosen


def compare(arguments: argparse.Namespace) -> dict:
    """Everything that the JSON holds but its provenance."""
    comparison = Comparison(arguments)
    comparison.fitted_rivals()
    comparison.checkpoints()
    if "random" in arguments.methods:
        comparison.random()
    if "cola" in arguments.methods:
        comparison.ceiling()
    return {
        "reward": arguments.reward,
        "base": comparison.bench.key,
        "blocks": comparison.num_blocks,
        "skips": arguments.skips,
        "training_questions": len(comparison.bench.training),
        "test_questions": len(comparison.bench.prompts),
        "rows": comparison.rows,
    }


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    arguments = parse_arguments(argv)
    start = time.perf_counter()
    result = compare(arguments)
    write_result(
        arguments.output,
        result,
        command=command_line(PROGRAM, argv),
        seed=range(arguments.seed, arguments.seed + arguments.seeds),
        seconds=time.perf_counter() - start,
        table=table5(result["rows"]),
    )


if __name__ == "__main__":
    raise SystemExit(main())
