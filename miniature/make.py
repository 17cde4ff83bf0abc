"""Makes the bundled toy model ("miniature"): a small base language model, its tokenizer and its questions.

    python miniature/make.py questions     # miniature/data/{arc_easy,arc_challenge,dart_math}_{train,test}.jsonl
    python miniature/make.py train         # miniature/model/ (about 35 minutes on 2 cores; resumes from its checkpoint)
    python miniature/make.py evaluate      # accuracy per set: default path, single edits, random edits; per kind

Everything follows from one seed. The README says what the model stands for and what it does not.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":  # run by its file name, from any folder
    sys.path[0] = str(HERE.parent)

from drllm.arguments import MAX_SEED, add_shared, check_ranges  # noqa: E402
from drllm.checkpoints import checkpoint_info  # noqa: E402
from drllm.errors import UserError, main_guard  # noqa: E402
from drllm.files import check_output_folder  # noqa: E402
from miniature.measurement import evaluate  # noqa: E402
from miniature.pretraining import PretrainingSettings, train  # noqa: E402
from miniature.questions import write_questions  # noqa: E402
from miniature.training_paths import KnownPaths, RandomEdits, read_known_paths  # noqa: E402


def block_numbers(text: str) -> tuple[int, ...]:
    """Comma-separated block numbers, e.g. "1,2,5"."""
    return tuple(int(number) for number in text.split(","))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an argument out of range, a folder that is not a model, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    ask = commands.add_parser("questions", help="write the question files")
    ask.add_argument("--output_dir", type=Path, default=HERE / "data", help="folder of the question files")
    ask.add_argument("--train", type=int, default=800, help="questions per set for search and router training")
    ask.add_argument("--test", type=int, default=400, help="questions per set for evaluation")
    add_shared(ask, "seed", 0)
    fit = commands.add_parser("train", help="pre-train a base model")
    fit.add_argument("--output_dir", type=Path, default=HERE / "model", help="folder of the base model")
    fit.add_argument("--init", type=Path, help="continue from the weights in this folder, e.g. miniature/plain/model")
    fit.add_argument("--double", type=block_numbers, default=(), help="blocks of --init to have twice, e.g. 1,2,5")
    fit.add_argument("--known_paths", type=Path, help="JSON file, kind -> path; default: random edits per set")
    fit.add_argument("--family", choices=("llama", "qwen2", "qwen3"), default="llama", help="architecture")
    fit.add_argument("--blocks", type=int, default=10, help="number of blocks")
    fit.add_argument("--width", type=int, default=128, help="size of the hidden states")
    fit.add_argument("--steps", type=int, default=3000, help="optimiser steps")
    fit.add_argument("--batch_size", type=int, default=128, help="questions per optimiser step")
    fit.add_argument("--learning_rate", type=float, default=3e-3, help="peak learning rate")
    fit.add_argument("--skip_rate", type=float, help="one rate for all sets; 0 with --repeat_rate 0 trains plainly")
    fit.add_argument("--repeat_rate", type=float, help="one rate for all sets")
    fit.add_argument("--default_share", type=float, default=0.3, help="share of questions that follow the default path")
    fit.add_argument("--save_steps", type=int, default=250, help="steps between checkpoints")
    fit.add_argument(
        "--processes", type=int, default=2, help="processes of one thread each; changes the resulting weights"
    )
    slow = "dtype of Muon's orthogonalisation; float32 is several times faster on CPUs without bfloat16 arithmetic"
    fit.add_argument("--muon_dtype", choices=("bfloat16", "float32"), default="bfloat16", help=slow)
    add_shared(fit, "seed", 0)
    measure = commands.add_parser("evaluate", help="accuracy per set under the default path, single and random edits")
    add_shared(measure, "model", HERE / "model", "the miniature")
    measure.add_argument("--known_paths", type=Path, help="JSON file, kind -> path: only these and the default path")
    measure.add_argument("--part", choices=("train", "test"), default="test", help="part of the questions")
    measure.add_argument("--number", type=int, default=400, help="questions per set")
    measure.add_argument("--threads", type=int, default=2, help="CPU threads")
    add_shared(measure, "seed", 0)
    arguments = parser.parse_args(argv)
    given = vars(arguments).keys()
    some = ("train", "test", "blocks", "steps", "batch_size", "save_steps", "processes", "number", "threads")
    rates = ("skip_rate", "repeat_rate", "default_share")
    ranges = dict.fromkeys(some, (1, math.inf)) | dict.fromkeys(rates, (0, 1))
    ranges |= {"seed": (0, MAX_SEED), "learning_rate": (0, math.inf), "width": (8, math.inf)}
    check_ranges(arguments, **{name: limits for name, limits in ranges.items() if name in given})
    if "output_dir" in given:
        check_output_folder(arguments.output_dir, "--output_dir")
    check_model(arguments)
    return arguments


def check_model(arguments: argparse.Namespace) -> None:
    """Raises UserError for a width that four heads cannot share, and for a folder without a model."""
    if arguments.command == "train":
        if arguments.width % 8:
            raise UserError(f"--width {arguments.width}: must be a multiple of 8, for four heads with rotary positions")
        if arguments.batch_size < arguments.processes:
            raise UserError(f"--batch_size {arguments.batch_size} is less than one question for each of --processes")
        if arguments.init is not None:
            checkpoint_info(arguments.init, is_local=True)
    if arguments.command == "evaluate":
        checkpoint_info(arguments.model, is_local=True)


def pretraining_settings(arguments: argparse.Namespace) -> PretrainingSettings:
    """What `train` is to do. UserError when the file of known paths is not valid."""
    if arguments.double and arguments.init is None:
        raise UserError("--double needs the model whose blocks it doubles: add --init")
    if arguments.known_paths is None:
        paths = RandomEdits(arguments.blocks, arguments.default_share, arguments.skip_rate, arguments.repeat_rate)
    else:
        paths = KnownPaths(read_known_paths(arguments.known_paths), arguments.default_share)
    return PretrainingSettings(
        output_dir=arguments.output_dir, paths=paths, family=arguments.family, blocks=arguments.blocks,
        width=arguments.width, init=arguments.init, doubled=arguments.double, steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate, processes=arguments.processes, save_steps=arguments.save_steps,
        muon_dtype=arguments.muon_dtype, seed=arguments.seed,
    )  # fmt: skip


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Runs the sub-command of the command line."""
    arguments = parse_arguments(argv)
    if arguments.command == "questions":
        write_questions(arguments.output_dir, arguments.train, arguments.test, arguments.seed)
    elif arguments.command == "train":
        train(pretraining_settings(arguments))
    else:
        evaluate(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
