"""What edits of the default path do to accuracy and to the right option's probability, from stored scores.

    python -m experiments.edit_effects --scores checkpoints/groups-measured --data_dir questions \
        --dataset arc,openbookqa,commonsense --train_questions 600 --validation_questions 250 --output effects.json

Reads the scores that `experiments.group_paths --reward likelihood` has measured; nothing is measured anew. A path has a
row for each part of a set (training, validation) of which at least --share of the questions were scored along it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence

from drllm.errors import UserError, main_guard
from drllm.files import read_json
from drllm.group_paths.paths import describe_edits
from drllm.group_paths.scored_questions import add_scores_arguments, scored_parts
from drllm.provenance import command_line, write_result
from drllm.questions.sets import Question
from drllm.rollouts.scores import Scores, ScoreStore
from train_models.paths import EXECUTE
from train_models.paths import Path as BlockPath

PROGRAM = "python -m experiments.edit_effects"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an argument out of range, a missing folder, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_scores_arguments(parser, share=0.99, validates=True)
    arguments = parser.parse_args(argv)
    arguments.parts = scored_parts(arguments)
    return arguments


def effect(question: Question, base: Sequence[float], edited: Sequence[float]) -> tuple[float, float]:
    """Change of the right option's probability and of its being right, from `base` scores to `edited` ones."""
    gold = question.labels.index(question.answer)

    def outcome(scores: Sequence[float]) -> tuple[float, float]:
        probability = 1 / sum(math.exp(min(700.0, score - scores[gold])) for score in scores)
        rivals = [score for option, score in enumerate(scores) if option != gold]
        return probability, float(scores[gold] > max(rivals))

    before, after = outcome(base), outcome(edited)
    return after[0] - before[0], after[1] - before[1]


def effects_of(
    questions: Sequence[Question], scores_of: dict[str, dict[BlockPath, Scores]], share: float
) -> list[dict]:
    """One row per path along which at least `share` of the questions were scored; means and their standard errors."""
    changes: dict[BlockPath, list[tuple[float, float]]] = defaultdict(list)
    for question in questions:
        scores = scores_of.get(question.id, {})
        default = next((path for path in scores if set(path) == {EXECUTE}), None)
        if default is None:
            continue
        for path, edited in scores.items():
            if path != default:
                changes[path].append(effect(question, scores[default], edited))
    rows = []
    for path, pairs in changes.items():
        if len(pairs) < max(2, share * len(questions)):
            continue
        row = {"path": list(path), "edits": describe_edits(path), "layers": sum(path), "questions": len(pairs)}
        for name, values in zip(("probability", "accuracy"), zip(*pairs, strict=True), strict=True):
            row[name] = statistics.mean(values)
            row[f"{name}_error"] = statistics.stdev(values) / math.sqrt(len(values))
        rows.append(row)
    return sorted(rows, key=lambda row: -row["probability"])


def table(result: dict) -> str:
    """The rows as Markdown, in points."""
    lines = [
        "| set | part | questions | edits | layers | probability of the right option | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [f"{100 * row[name]:+.2f} ± {100 * row[f'{name}_error']:.2f}" for name in ("probability", "accuracy")]
        start = f"| {row['set']} | {row['part']} | {row['questions']} | {row['edits']} | {row['layers']} | "
        lines.append(start + " | ".join(cells) + " |")
    return "\n".join(lines)


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    arguments = parse_arguments(argv)
    start = time.perf_counter()
    key = read_json(arguments.scores / "scores.json", "name another folder")
    scores_of = ScoreStore(arguments.scores, key, rank=None).by_question()
    rows = []
    for name, parts in arguments.parts.split(arguments.data_dir, arguments.unlike, arguments.seed).items():
        for part, questions in zip(("training", "validation"), parts, strict=True):
            rows += [{"set": name, "part": part} | row for row in effects_of(questions, scores_of, arguments.share)]
    if not rows:
        raise UserError(f"{arguments.scores} has no path scored along by {arguments.share:g} of a set; lower --share")
    result = {"base": key, "rows": rows}
    write_result(
        arguments.output,
        result,
        command=command_line(PROGRAM, argv),
        seed=arguments.seed,
        seconds=time.perf_counter() - start,
        table=table(result),
    )


if __name__ == "__main__":
    raise SystemExit(main())
