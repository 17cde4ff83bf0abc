"""Lists training questions that no earlier run has scored, trained on or chosen by: questions for a test.

    python -m experiments.fresh_questions --data_dir questions --dataset arc,openbookqa,commonsense \
        --unlike arc,openbookqa,commonsense,piqa,truthfulqa_mc1 --results results/smollm2 \
        --used arc_easy=2100,arc_challenge=1050,openbookqa=1300,commonsense=2400 --most 1500 --output questions.json

A question is seen if a score or label in the files below --results has its id, if it is on a list of --lists, or if it
is among the first --used questions of its set in the seeded order of the searches. Questions that nearly repeat a seen
question or a test question of --unlike are left out. The list takes the others in the seeded order: a JSON file,
set -> ids.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path

from drllm.arguments import MAX_SEED, add_shared, check_ranges
from drllm.errors import UserError, main_guard
from drllm.files import check_output_file, read_json, write_json
from drllm.questions.overlap import load_training_questions, near_duplicates
from drllm.questions.per_set import numbers_per_set
from drllm.questions.sets import Question, expand_sets, load_questions
from drllm.search.selection import seeded_order


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an argument out of range, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.fresh_questions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_shared(parser, "data_dir", says="the Hub")
    add_shared(parser, "dataset", required=True)
    add_shared(parser, "unlike", "")
    add("--results", type=Path, action="append", default=[], help="folder of seen scores and labels; repeatable")
    add("--lists", type=Path, action="append", default=[], help="file that this program wrote; repeatable")
    add("--used", default="0", help="first questions per set, in the seeded order, that runs used: e.g. openbookqa=900")
    add_shared(parser, "seed", 0, about=": the one that gave those runs their order of questions")
    add("--most", type=int, help="questions per set (default: all that are left)")
    add_shared(parser, "output", required=True, about=", set -> ids")
    arguments = parser.parse_args(argv)
    check_ranges(arguments, most=(1, math.inf), seed=(0, MAX_SEED))
    sets = expand_sets(arguments.dataset)
    if arguments.unlike:
        expand_sets(arguments.unlike)
    arguments.used = dict.fromkeys(sets, 0) | numbers_per_set("--used", arguments.used, sets, "0")
    check_output_file(arguments.output, "--output")
    return arguments


def seen_ids(folder: Path) -> Iterator[str]:
    """Question ids of all scores and labels in the `*.jsonl` and `*.jsonl.gz` files below `folder`.

    Raises:
        UserError: no such file, or a line that is neither a score nor a label.
    """
    files = sorted((*folder.rglob("*.jsonl"), *folder.rglob("*.jsonl.gz")))
    if not files:
        raise UserError(f"{folder} holds no scores or labels; name a folder of .jsonl or .jsonl.gz files")
    for file in files:
        with gzip.open(file, "rt") if file.suffix == ".gz" else open(file) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                    yield row["question_id"] if isinstance(row, dict) else row[0]
                except (ValueError, KeyError, IndexError, TypeError):
                    raise UserError(f"{file}:{number}: neither a score nor a label; delete the line") from None


def fresh_questions(
    order: dict[str, list[Question]], used: dict[str, int], seen: set[str], tests: list[Question], most: int | None
) -> dict[str, tuple[list[Question], int, int]]:
    """For each set: (the list, unseen questions, those that repeat no seen question).

    Args:
        order: all training questions of each set, in the seeded order.
        used: how many of the first ones of each set that are unlike `tests` were seen.
        seen: ids of further seen questions.
        tests: questions that none of the list may nearly repeat.
        most: questions of a list; None: all.
    """
    unlike: dict[str, list[Question]] = {}
    known = []
    for name, questions in order.items():
        repeated = near_duplicates(questions, tests)
        unlike[name] = [question for question in questions if question.id not in repeated]
        first = {question.id for question in unlike[name][: used[name]]}
        known += [question for question in questions if question.id in first or question.id in seen]
    known_ids = {question.id for question in known}
    result = {}
    for name, questions in unlike.items():
        unseen = [question for question in questions if question.id not in known_ids]
        repeated = near_duplicates(unseen, known)
        left = [question for question in unseen if question.id not in repeated]
        result[name] = (left[:most], len(unseen), len(left))
    return result


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    arguments = parse_arguments(argv)
    sets = expand_sets(arguments.dataset)
    seen = {question_id for folder in arguments.results for question_id in seen_ids(folder)}
    for file in arguments.lists:
        for ids in read_json(file, "name a list of this program").values():
            seen.update(ids)
    unlike = expand_sets(arguments.unlike) if arguments.unlike else ()
    tests = [question for name in unlike for question in load_questions(name, "test", arguments.data_dir)]
    order = {
        name: seeded_order(of_set, arguments.seed)
        for name, of_set in load_training_questions(sets, arguments.data_dir).items()
    }
    found = fresh_questions(order, arguments.used, seen, tests, arguments.most)
    write_json(arguments.output, {name: [question.id for question in chosen] for name, (chosen, *_) in found.items()})
    for name, (chosen, unseen, left) in found.items():
        print(f"{name}: {unseen} unseen, {left} of them repeat no seen question, {len(chosen)} listed")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    raise SystemExit(main())
