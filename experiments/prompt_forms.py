"""Compares forms of the prompt on the base model of some labels: is it form or knowledge that a path changes?

    python -m experiments.prompt_forms --data out/qwen/labels --static_paths "skip 17" --output results/forms.json

The same test questions are answered along the default path in four forms, and along --static_paths in the first one:

    as the labels   prompts and response format of the label folder
    template        the chat template switched on, or off where the labels have it, with the default response format
    one example     one solved training question before each question, without the chat template; of --candidates
                    examples the one with which most training questions are answered

For each form: accuracy with its paired difference to the first form, the share of responses that hold an answer, the
accuracy among those, and how often each option label is chosen. What was answered is kept in --work_dir: run the same
command to resume.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm

from data_models import load_path_model
from drllm.arguments import add_shared, check_ranges
from drllm.checkpoints import load_tokenizer
from drllm.edits import describe_edits, parse_paths, paths_of_edits
from drllm.errors import UserError, main_guard
from drllm.files import check_output_file, check_output_folder
from drllm.labels import read_labels
from drllm.loading import loading
from drllm.manifests import Manifest, read_manifest
from drllm.provenance import command_line, fingerprint, parse_dtype, write_result
from drllm.questions.grading import extract_label
from drllm.questions.overlap import load_training_questions
from drllm.questions.prompts import Prompt, adds_special_tokens, render_prompt
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import GROUPS, SETS, Question, load_questions
from drllm.rollouts.engine import Request, RolloutEngine
from drllm.rollouts.rewards import Generation
from drllm.rollouts.scores import ScoreStore
from drllm.search.selection import seeded_order
from drllm.text_tables import EMPTY, markdown
from extensions.baselines.outcomes import paired_difference
from train_models.paths import Path as BlockPath
from train_models.paths import default_path

PROGRAM = "python -m experiments.prompt_forms"
LABELS, TEMPLATE, EXAMPLE = "as the labels", "template", "one example"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        UserError: an argument out of range, or an output that cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="label folder: model, dtype, questions, prompts, response format")
    add_shared(parser, "data_dir", says="that of the labels")
    add("--test_questions", type=int, help="test questions per set (default: all)")
    add("--train_questions", type=int, default=24, help="training questions per set that choose (default: 24)")
    add("--candidates", type=int, default=4, help="examples per collection that are tried (default: 4)")
    add("--static_paths", default="", help='static paths by edits: "skip 19; skip 18, repeat 27"')
    add_shared(parser, "seed", 0, about=": the order of training questions")
    add_shared(parser, "batch_size", 16)
    add_shared(parser, "work_dir", Path("out/prompt_forms"))
    add_shared(parser, "output", required=True)
    arguments = parser.parse_args(argv)
    check_ranges(
        arguments,
        **dict.fromkeys(("train_questions", "candidates", "batch_size"), (1, math.inf)),
        test_questions=(2, math.inf),
    )
    arguments.static_paths = parse_paths("--static_paths", arguments.static_paths)
    check_output_file(arguments.output, "--output")
    check_output_folder(arguments.work_dir, "--work_dir")
    return arguments


def solved(question: Question, response_format: ResponseFormat) -> str:
    """A question as a prompt of `response_format` asks it, with its answer."""
    seed = response_format.seed(question)
    boxed = f"\\boxed{{{question.answer}}}" if SETS[question.set].kind == "math" else question.answer
    return f"{render_prompt(question, response_format)}{boxed.removeprefix(seed) if seed else ' ' + boxed}\n\n"


def with_example(prompt: Prompt, example: str, tokenizer) -> Prompt:
    """`prompt` after a solved question."""
    text = example + prompt.text
    ids = tokenizer(text, add_special_tokens=adds_special_tokens(text, tokenizer))["input_ids"]
    return replace(prompt, text=text, input_ids=tuple(ids))


class Answers:
    """The answers of one model, kept on disk: per prompt whether it is right, and the label that was chosen.

    Args:
        engine: answers prompts along paths.
        folder: one folder per form below it.
        key: what answers depend on besides form, question and path.
    """

    def __init__(self, engine: RolloutEngine, folder: Path, key: dict) -> None:
        self.engine, self.folder, self.key = engine, folder, key

    def of(self, form: str, prompts: Sequence[Prompt], path: BlockPath) -> list[tuple[float, ...]]:
        """Per prompt (1 for a right answer, 1 for a response with an answer, place of the chosen label or -1)."""
        store = ScoreStore(self.folder / form.replace(" ", "_"), self.key | {"form": form})
        waiting = [prompt for prompt in prompts if store.get(prompt.question.id, path) is None]
        waiting.sort(key=lambda prompt: len(prompt.input_ids))
        size = self.engine.batch_size
        title = f"{form} {describe_edits(path)}".strip()
        with tqdm(total=len(waiting), desc=title, unit="question", mininterval=1) as progress:
            for start in range(0, len(waiting), size):
                batch = waiting[start : start + size]
                rollouts = self.engine.respond([Request(prompt, path, to_the_end=True) for prompt in batch])
                store.add(
                    (prompt.question.id, path, _judged(prompt, rollout.response, rollout.is_right))
                    for prompt, rollout in zip(batch, rollouts, strict=True)
                )
                for prompt in batch:
                    self.engine.forget(prompt.question)
                progress.update(len(batch))
        return [store.get(prompt.question.id, path) or () for prompt in prompts]


def _judged(prompt: Prompt, response: str, is_right: bool) -> tuple[float, ...]:
    question, answer_format = prompt.question, prompt.response_format
    label = extract_label(response, question.labels) if question.labels else None
    place = question.labels.index(label) if label else -1
    return float(is_right), float(answer_format.has_answer(question, response)), float(place)


def form_rows(
    name: str, prompts: Sequence[Prompt], answers: Sequence[tuple[float, ...]], reference: Sequence[tuple[float, ...]]
) -> list[dict]:
    """One row per collection: accuracy, its paired difference to `reference`, form, and chosen labels."""
    rows = []
    for group, members in GROUPS.items():
        places = [place for place, prompt in enumerate(prompts) if prompt.question.set in members]
        if len(places) < 2:
            continue
        right = [answers[place][0] for place in places]
        answered = sum(answers[place][1] for place in places)
        chosen = Counter(int(answers[place][2]) for place in places if answers[place][2] >= 0)
        rows.append(
            {
                "form": name,
                "group": group,
                "questions": len(places),
                "accuracy": sum(right) / len(right),
                "difference": paired_difference(right, [reference[place][0] for place in places]),
                "answered": answered / len(places),
                "accuracy_of_answered": sum(right) / answered if answered else None,
                "labels": {"ABCDE"[place]: count for place, count in sorted(chosen.items()) if place < 5},
            }
        )
    return rows


def forms_table(rows: Sequence[dict]) -> str:
    """`form_rows` as Markdown."""
    header = ["form", "sets", "questions", "accuracy", "points against the labels' form"]
    header += ["responses with an answer", "accuracy among those", "labels chosen"]
    cells = []
    for row in rows:
        difference, among = row["difference"], row["accuracy_of_answered"]
        cells.append(
            [
                row["form"],
                row["group"],
                str(row["questions"]),
                f"{100 * row['accuracy']:.1f}",
                f"{difference['points']:+.1f} [{difference['low']:+.1f}, {difference['high']:+.1f}]",
                f"{100 * row['answered']:.1f}%",
                EMPTY if among is None else f"{100 * among:.1f}",
                " ".join(f"{label} {count}" for label, count in row["labels"].items()) or EMPTY,
            ]
        )
    return markdown(header, cells)


def measure(arguments: argparse.Namespace, made_with: Manifest, static_paths: Sequence[BlockPath]) -> dict:
    """Everything that the JSON holds but its provenance."""
    tokenizer = load_tokenizer(made_with.model, made_with.revision)
    with loading(made_with.model, "model", made_with.revision):
        model = load_path_model(made_with.model, dtype=parse_dtype(made_with.dtype), revision=made_with.revision)
    key = {"model_fingerprint": fingerprint(model), "dtype": made_with.dtype}
    key |= Generation().key(made_with.chat_template, made_with.response_format)
    if key["model_fingerprint"] != made_with.model_fingerprint:
        raise UserError(f"{made_with.model} has other weights than the model of the labels in {arguments.data}")
    model = model.eval().to(PartialState().device)
    answers = Answers(RolloutEngine(model, tokenizer, arguments.batch_size), arguments.work_dir, key)
    default = default_path(made_with.num_layers)
    data_dir = arguments.data_dir or made_with.data_dir or None
    sets = made_with.arguments.get("dataset") or sorted({label.set for label in read_labels(arguments.data).labels})
    training = load_training_questions(sets, data_dir)
    training = {name: seeded_order(questions, arguments.seed) for name, questions in training.items()}
    test = [q for name in sets for q in load_questions(name, "test", data_dir)[: arguments.test_questions]]

    def prompts_of(questions: Sequence[Question], chat: bool, answer_format: ResponseFormat) -> list[Prompt]:
        return [Prompt.of(question, tokenizer, chat, answer_format) for question in questions]

    chat, of_labels = made_with.chat_template, made_with.response_format
    plain = replace(of_labels, inject_boxed=of_labels.inject_boxed and not chat)
    prompts = prompts_of(test, chat, of_labels)
    reference = answers.of(LABELS, prompts, default)
    rows = form_rows(LABELS, prompts, reference, reference)
    for edits, path in zip(arguments.static_paths, static_paths, strict=True):
        along = answers.of(LABELS, prompts, path)
        rows += form_rows(f"{LABELS}, {edits}", prompts, along, reference)
    if tokenizer.chat_template:
        other = answers.of(TEMPLATE, prompts_of(test, not chat, ResponseFormat()), default)
        rows += form_rows(f"{'without' if chat else 'with'} chat template", prompts, other, reference)
    chosen: dict[str, dict] = {}
    for group, members in GROUPS.items():
        in_order = [question for name in members if name in training for question in training[name]]
        if not in_order:
            continue
        few = [q for name in members if name in training for q in training[name][: arguments.train_questions]]
        # Those after the questions that choose, of all sets in turn.
        rest = [training[name][arguments.train_questions :] for name in members if name in training]
        examples = [question for turn in zip(*rest, strict=False) for question in turn][: arguments.candidates]
        if not examples:
            raise UserError(f"--train_questions {arguments.train_questions} leaves no {group} question as an example")
        right = {}
        for example in examples:
            shown = [with_example(p, solved(example, plain), tokenizer) for p in prompts_of(few, False, plain)]
            right[example.id] = sum(row[0] for row in answers.of(f"{EXAMPLE} {example.id}", shown, default)) / len(few)
        best = max(examples, key=lambda example: right[example.id])
        asked = [question for question in test if question.set in members]
        shown = [with_example(prompt, solved(best, plain), tokenizer) for prompt in prompts_of(asked, False, plain)]
        places = [place for place, question in enumerate(test) if question.set in members]
        of_test = answers.of(f"{EXAMPLE} {best.id}", shown, default)
        rows += form_rows(EXAMPLE, shown, of_test, [reference[place] for place in places])
        chosen[group] = {"example": best.id, "training_accuracy": right}
    return {"rows": rows, "examples": chosen, "test_questions": len(test), "base": key}


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    arguments = parse_arguments(argv)
    made_with = read_manifest(arguments.data)
    static_paths = paths_of_edits("--static_paths", arguments.static_paths, made_with.num_layers)
    start = time.perf_counter()
    result = measure(arguments, made_with, static_paths)
    write_result(
        arguments.output,
        result,
        command=command_line(PROGRAM, argv),
        seed=arguments.seed,
        seconds=time.perf_counter() - start,
        table=forms_table(result["rows"]),
    )


if __name__ == "__main__":
    raise SystemExit(main())
