"""Command-line arguments of the programs that read what `experiments.group_paths --reward likelihood` has measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from drllm.arguments import MAX_SEED, check_ranges
from drllm.errors import UserError
from drllm.files import check_output_file
from drllm.group_paths.parts import DEFAULT_TRAIN, DEFAULT_VALIDATION, Parts
from drllm.questions.sets import expand_sets


def add_scores_arguments(parser: argparse.ArgumentParser, share: float, validates: bool) -> None:
    """Adds --scores, --output, and which questions were scored.

    Args:
        share: default of --share.
        validates: whether the program tells validation questions from training questions.
    """
    add = parser.add_argument
    add("--scores", type=Path, required=True, help="folder of scores that experiments.group_paths has measured")
    add("--data_dir", type=Path, help="local question files; default: the Hub")
    add("--dataset", default="arc,openbookqa,commonsense", help="as given to experiments.group_paths, like the others")
    add("--unlike", default="", help="sets whose test questions no training question repeats")
    add("--seed", type=int, default=0, help="of the order of questions (default: 0)")
    add("--train_questions", default=DEFAULT_TRAIN, help=f"most per set (default: {DEFAULT_TRAIN})")
    if validates:
        add("--validation_questions", default=DEFAULT_VALIDATION, help=f"most per set (default: {DEFAULT_VALIDATION})")
    add("--share", type=float, default=share, help=f"least share of questions scored along a path (default: {share})")
    add("--output", type=Path, required=True, help="JSON file; a .md is written beside it")


def scored_parts(arguments: argparse.Namespace) -> Parts:
    """The questions that the arguments of `add_scores_arguments` name, after checking these.

    Raises:
        UserError: an argument out of range, a missing folder, or an output that cannot be written.
    """
    check_ranges(arguments, share=(0, 1), seed=(0, MAX_SEED))
    sets = expand_sets(arguments.dataset)
    if arguments.unlike:
        expand_sets(arguments.unlike)
    validation = getattr(arguments, "validation_questions", DEFAULT_VALIDATION)
    parts = Parts.of(sets, arguments.train_questions, validation)
    check_output_file(arguments.output, "--output")
    if not (arguments.scores / "scores.json").is_file():
        raise UserError(f"--scores {arguments.scores}: no scores.json; name a folder of experiments.group_paths")
    return parts
