"""A menu of static paths for servers that run one path each: which paths, what they cover, what chooses between them.

    python -m experiments.menu --checkpoint "as published=checkpoints/drllm" --output results/NAME/menu.json
    python -m experiments.menu --model MODEL --reward likelihood --export_dir menus/NAME --export_size 4 --output ...

Candidates, all measured on the training questions: every single edit of the default path, then --rounds times the edits
of two of the --beam best candidates together; or the default path and --paths alone. The menu takes the most accurate
one first, then again and again the one that answers most of the questions that no path of the menu answers. So the best
single path is the menu of one.

A chooser predicts each path's reward from the counts of a prompt's tokens (ridge regression; nothing of the model is
needed) and takes the highest. On test questions: the share that some path of the menu answers (coverage, for which one
has to know the right answer; beside it the share of wrong options that some path takes, which is luck), the chooser,
the best single path, the base, and the routers of --checkpoint, paired. With --export_dir the paths are written as
stock checkpoints (docs/serving.md), beside the chooser.
"""

from __future__ import annotations

import argparse
import datetime
import math
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_array
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import normalize

from drllm.arguments import MAX_SEED, add_shared, check_ranges, parse_list
from drllm.checkpoints import load_routed_checkpoint
from drllm.edits import describe_edits, parse_paths, paths_of_edits
from drllm.errors import UserError, main_guard
from drllm.files import check_output_file, check_output_folder, write_json, write_tensors
from drllm.processes import process_state
from drllm.provenance import command_line, fingerprint, write_result
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.stock_checkpoint import Source, export_checkpoint
from drllm.text_tables import EMPTY, markdown
from extensions.baselines.bench import Bench
from extensions.baselines.interface import AnyPrompt
from extensions.baselines.outcomes import Outcome, paired_difference
from extensions.baselines.protocol import Protocol, add_protocol_arguments, check_protocol_arguments, load_parts
from train_models.paths import EXECUTE, REPEAT, SKIP, default_path, is_allowed
from train_models.paths import Path as BlockPath

PROGRAM = "python -m experiments.menu"
PENALTIES = np.logspace(-2, 4, 13)  # of the ridge regression; leave-one-out error on the training questions decides
CHOOSER, MENU = "chooser.safetensors", "menu.json"  # beside exported paths


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an argument out of range, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_protocol_arguments(parser, train_questions=200)
    add("--paths", default="", help='candidates in place of searched ones, by edits: "skip 19; skip 18, repeat 27"')
    add("--rounds", type=int, default=2, help="times that candidates are combined (default: %(default)s)")
    add("--beam", type=int, default=8, help="candidates that are combined (default: %(default)s)")
    add("--sizes", default="1,2,4,8,16", help="paths of the menus to report (default: %(default)s)")
    add("--export_dir", type=Path, help="new folder for the paths of a menu as stock checkpoints, and its chooser")
    add("--export_size", type=int, default=4, help="paths that are exported (default: %(default)s)")
    add_shared(parser, "seed", 0, about=", which is the order of questions")
    add_shared(parser, "batch_size", 16)
    add_shared(parser, "work_dir", Path("out/menu/work"))
    add_shared(parser, "output", required=True)
    arguments = parser.parse_args(argv)
    arguments.sizes = parse_list("sizes", arguments.sizes, int, "1,2,4")
    at_least_one = ("beam", "sizes", "export_size", "batch_size")
    check_ranges(
        arguments,
        **dict.fromkeys(at_least_one, (1, math.inf)),
        rounds=(0, math.inf),
        seed=(0, MAX_SEED),
    )
    check_protocol_arguments(arguments)
    arguments.paths = parse_paths("--paths", arguments.paths)
    for output in (arguments.output, arguments.output.with_suffix(".md")):
        check_output_file(output, "--output")
    check_output_folder(arguments.work_dir, "--work_dir")
    if arguments.export_dir is not None:
        check_output_folder(arguments.export_dir, "--export_dir")
        if arguments.export_dir.exists():
            raise UserError(f"--export_dir {arguments.export_dir} exists; name a new folder")
    return arguments


def candidates(bench: Bench, rounds: int, beam: int) -> dict[BlockPath, Outcome]:
    """The outcomes of many paths on the training questions; see the top of this file."""
    default = default_path(bench.num_blocks)
    options = [default]
    options += [
        (*default[:block], action, *default[block + 1 :])
        for block in range(bench.num_blocks)
        for action in (SKIP, REPEAT)
    ]
    scored: dict[BlockPath, Outcome] = {}
    for number in range(rounds + 1):
        scored |= bench.training_outcomes(options, f"candidates, round {number}")
        best = sorted(scored, key=lambda path: np.mean(scored[path].value), reverse=True)[:beam]
        pairs = (_together(*pair) for pair in combinations(best, 2))
        options = list(dict.fromkeys(path for path in pairs if path and path not in scored and is_allowed(path)))
    return scored


def _together(first: BlockPath, second: BlockPath) -> BlockPath | None:
    """The edits of both paths; None where they disagree about a block."""
    if any(EXECUTE not in (a, b) and a != b for a, b in zip(first, second, strict=True)):
        return None
    return tuple(b if a == EXECUTE else a for a, b in zip(first, second, strict=True))


def choose(scored: Mapping[BlockPath, Outcome], size: int) -> list[BlockPath]:
    """The menu: each path answers most of what the ones before it do not; ties by mean reward, then fewer blocks."""
    right = {path: np.array(outcome.right) for path, outcome in scored.items()}
    covered, menu = np.zeros(len(next(iter(right.values())))), []
    for _ in range(min(size, len(scored))):
        menu.append(
            max(
                (path for path in scored if path not in menu),
                key=lambda path: (np.maximum(covered, right[path]).sum(), np.mean(scored[path].value), -sum(path)),
            )
        )
        covered = np.maximum(covered, right[menu[-1]])
    return menu


def coverage(outcomes: Sequence[Outcome]) -> float:
    """The share of questions that at least one of the outcomes answers."""
    return float(np.max([outcome.right for outcome in outcomes], axis=0).mean())


def wrong_coverage(prompts: Sequence[LikelihoodPrompt], taken: Sequence[Sequence[int]]) -> float:
    """The share of wrong options that at least one path takes, averaged over questions: coverage by luck alone.

    Args:
        taken: per path the option that it takes for each question.
    """
    shares = []
    for prompt, options in zip(prompts, zip(*taken, strict=True), strict=True):
        wrong = set(range(len(prompt.rows))) - {prompt.gold}
        shares.append(len(wrong & set(options)) / len(wrong))
    return float(np.mean(shares))


def token_counts(prompts: Sequence[AnyPrompt], vocabulary: int) -> csr_array:
    """How often each token occurs in each prompt, rows scaled to length 1: sparse [prompts, vocabulary]."""
    ids = [prompt.input_ids for prompt in prompts]
    ends = np.cumsum([0, *map(len, ids)])
    counts = csr_array((np.ones(ends[-1]), np.concatenate(ids), ends), shape=(len(ids), vocabulary))
    counts.sum_duplicates()
    return normalize(counts)


def fit_chooser(counts: csr_array, rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights [paths, vocabulary] and biases [paths] by which `token_counts` predict `rewards` [prompts, paths]."""
    ridge = RidgeCV(alphas=PENALTIES).fit(counts, rewards)
    return ridge.coef_.reshape(rewards.shape[1], -1), np.atleast_1d(ridge.intercept_)


class Report:
    """Menus and their rivals on the test questions of a bench."""

    def __init__(self, bench: Bench, scored: Mapping[BlockPath, Outcome], menu: Sequence[BlockPath]) -> None:
        self.bench = bench
        self.scored = scored
        self.menu = menu
        bench.score([menu] * len(bench.prompts), "menu")
        self.tested = [bench.along([path] * len(bench.prompts)) for path in menu]
        self.taken = [bench.options_taken(path) for path in menu] if bench.reward.has_options else None
        vocabulary = len(bench.tokenizer)
        self.training_counts = token_counts([answered.prompt for answered in bench.training], vocabulary)
        self.counts = token_counts(bench.prompts, vocabulary)

    def chooser(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """`fit_chooser` of the first `size` paths."""
        rewards = np.array([self.scored[path].value for path in self.menu[:size]]).T
        return fit_chooser(self.training_counts, rewards)

    def menu_row(self, size: int) -> dict:
        """Coverage of the first `size` paths, and what their chooser makes of it."""
        weights, bias = self.chooser(size)
        places = (self.counts @ weights.T + bias).argmax(axis=1)
        chosen = self.bench.along([self.menu[place] for place in places])
        return {
            "paths": [describe_edits(path) for path in self.menu[:size]],
            "training_coverage": coverage([self.scored[path] for path in self.menu[:size]]),
            "coverage": coverage(self.tested[:size]),
            "wrong_coverage": self.taken and wrong_coverage(self.bench.prompts, self.taken[:size]),
            "shares": (np.bincount(places, minlength=size) / len(places)).tolist(),
            **self.row(chosen),
        }

    def row(self, outcome: Outcome) -> dict:
        """Accuracy and blocks, paired with the base and with the best single path."""
        return {
            "accuracy": outcome.accuracy,
            "blocks": outcome.mean_layers,
            "against_base": paired_difference(outcome.right, self.bench.base.right),
            "against_single": paired_difference(outcome.right, self.tested[0].right),
            "value_against_single": paired_difference(outcome.value, self.tested[0].value),
        }

    def routers(self, checkpoints: Sequence[str], dtype: torch.dtype) -> dict[str, dict]:
        """A row for each NAME=FOLDER."""
        rows = {}
        for checkpoint in checkpoints:
            name, _, folder = checkpoint.partition("=")
            routed = load_routed_checkpoint(folder, dtype, self.bench.routed.device)
            if (found := fingerprint(routed)) != self.bench.key["model_fingerprint"]:
                raise UserError(
                    f"{folder} has base weights {found}, the base model has {self.bench.key['model_fingerprint']}"
                )
            rows[name] = self.row(self.bench.along(self.bench.decisions(routed, self.bench.prompts), name))
        return rows


def advice(rows: Sequence[dict]) -> str:
    """What to serve: the single path, unless the chooser of a menu is above it by a 95% interval."""
    single = rows[0]["paths"][0] or "the default path"
    better = [len(row["paths"]) for row in rows if row["against_single"]["low"] > 0]
    if better:
        return f"The choosers of {' and '.join(map(str, better))} paths beat the best single path, {single}."
    text = f"No chooser beats the best single path by a 95% interval; serve that path alone: {single}."
    return text if rows[0]["against_base"]["low"] > 0 else f"{text} Nor does it beat the base by one."


def table(result: dict) -> str:
    """Both tables and the advice as Markdown."""

    def interval(value: dict) -> str:
        return f"{value['points']:+.2f} [{value['low']:+.2f}, {value['high']:+.2f}]"

    def percent(share: float) -> str:
        return f"{100 * share:.2f}"

    def cells(row: dict) -> list[str]:
        numbers = [percent(row["accuracy"]), f"{row['blocks']:.2f}", interval(row["against_base"])]
        return [*numbers, interval(row["against_single"])]

    same = ["accuracy", "blocks", "points against base", "against the best single path"]
    menus = []
    for row in result["menus"]:
        shares = [row[name] for name in ("training_coverage", "coverage", "wrong_coverage")]
        covered = [EMPTY if share is None else percent(share) for share in shares]
        menus.append([str(len(row["paths"])), *covered, *cells(row)])
    methods = [[name, *cells(row)] for name, row in result["methods"].items()]
    header = ["paths", "coverage, training", "coverage, test", "of a wrong option"]
    order = "; ".join(path or "default" for path in result["menus"][-1]["paths"])
    return "\n\n".join(
        [
            markdown(["method", *same], methods),
            markdown([*header, *(f"chooser: {name}" for name in same)], menus),
            f"Paths in the order of their choice: {order}.",
            result["advice"],
        ]
    )


def export(report: Report, protocol: Protocol, folder: Path, size: int) -> None:
    """Writes the first `size` paths as stock checkpoints, the chooser, and menu.json, which names them in its order.

    Raises:
        UserError: see `drllm.stock_checkpoint`.
    """
    menu = [describe_edits(path) for path in report.menu[:size]]
    names = [edits.replace(", ", "_").replace(" ", "-") or "default" for edits in menu]
    source = Source(protocol.model, protocol.revision)
    for edits, name in zip(menu, names, strict=True):
        print(export_checkpoint(source, edits, folder / name))
    weights, bias = (torch.tensor(part, dtype=torch.float32).contiguous() for part in report.chooser(len(menu)))
    write_tensors(folder / CHOOSER, {"weights": weights, "bias": bias})
    write_json(folder / MENU, {"models": names, "edits": menu})


def measure(arguments: argparse.Namespace, protocol: Protocol, device: torch.device) -> tuple[Report, dict]:
    """The report, and everything that the JSON holds but its provenance."""
    bench = protocol.bench(load_parts(arguments, protocol), arguments.work_dir, arguments.batch_size, device)
    if arguments.paths:
        given = paths_of_edits("--paths", arguments.paths, bench.num_blocks)
        scored = bench.training_outcomes([default_path(bench.num_blocks), *given], "given paths")
    else:
        scored = candidates(bench, arguments.rounds, arguments.beam)
    report = Report(bench, scored, choose(scored, max(*arguments.sizes, arguments.export_size)))
    menus = [report.menu_row(size) for size in sorted({1, *arguments.sizes}) if size <= len(report.menu)]
    methods = {"base": report.row(bench.base), f"best single path: {menus[0]['paths'][0] or 'default'}": menus[0]}
    methods |= report.routers(arguments.checkpoint, protocol.dtype)
    return report, {
        "base": bench.key,
        "blocks": bench.num_blocks,
        "training_questions": len(bench.training),
        "test_questions": len(bench.prompts),
        "candidates": len(scored),
        "methods": methods,
        "menus": menus,
        "advice": advice(menus),
    }


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    arguments = parse_arguments(argv)
    start = time.perf_counter()
    state = process_state(datetime.timedelta(days=1))
    protocol = Protocol.of(arguments, state)
    report, result = measure(arguments, protocol, state.device)
    if state.is_main_process:
        result_of = {"command": command_line(PROGRAM, argv), "seed": arguments.seed}
        result_of |= {"seconds": time.perf_counter() - start, "table": table(result)}
        write_result(arguments.output, result, **result_of)
        if arguments.export_dir is not None:
            export(report, protocol, arguments.export_dir, arguments.export_size)
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
