"""The question sets of the paper: where they come from, and how their rows are read.

One definition serves the search (labels), the lm-eval tasks of `eval_tasks/` and the tables, so that a label
refers to the same question, prompt and grader as the reported number.

Questions come from the Hugging Face Hub, or from a folder of local files with the rows of the Hub's schema,
named `{stem}_{split}.jsonl` (or `.json`, `.parquet`), e.g. `arc_easy_train.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drllm.errors import UserError
from drllm.questions.hub_rows import hub_rows
from drllm.questions.response_text import last_box

UNANSWERABLE = "unanswerable"  # the answer to a SQuAD v2 question that its passage does not answer

# --------------------------------------------------------------------------------------------------------
# Questions and sets


@dataclass(frozen=True)
class Question:
    """One question of a set.

    `choices` and `labels` run in parallel for multiple choice ("A", "B", ... or "1", "2", ...); for spans
    (SQuAD) `choices` are all accepted answers; for DART both are empty. `answer` is a label, a LaTeX
    expression or a span. `id` is a hash of the set and the normalised content.
    """

    set: str
    id: str
    text: str
    choices: tuple[str, ...]
    labels: tuple[str, ...]
    answer: str
    context: str = ""


@dataclass(frozen=True)
class TaskSpec:
    """The source of a set and the form of its questions.

    Attributes:
        name: name of the set.
        hub_path, hub_config: the data set on the Hub.
        splits: maps "train" and "test" to the split names of the source.
        stem: start of the names of local files.
        kind: "choice", "math" or "span"; decides prompt and grader.
        parse: turns a row into the fields of `Question`, or into None for a row that belongs to another set; raises
            ValueError for a row that cannot be used.
        max_new_tokens: response limits of base models and of instruct (chat-templated) models.
        samples: number of training examples in Table 2; None where the paper gives none.
        test_source: (Hub path, configurations) of the test split, where it is another data set.
    """

    name: str
    hub_path: str
    hub_config: str | None
    splits: dict[str, str]
    stem: str
    kind: str  # "choice", "math" or "span"
    parse: Callable[[dict[str, Any]], dict[str, Any] | None]
    max_new_tokens: tuple[int, int]
    samples: int | None
    test_source: tuple[str, tuple[str, ...]] | None = None


def _text(row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise ValueError(f"no column '{column}' (columns: {', '.join(row) or 'none'})")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column '{column}' holds {value!r}, expected text")
    return value.strip()


def _texts(values: list[Any], column: str) -> tuple[str, ...]:
    """A column of texts or numbers as texts; ValueError for anything else, e.g. null."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"column '{column}' holds {value!r} in its list, expected text")
    return tuple(str(value).strip() for value in values)


def _parse_choice(row: dict[str, Any], column: str = "question") -> dict[str, Any]:
    """A row of ai2_arc or commonsense_qa: question (in `column`), choices {text, label}, answerKey."""
    text, answer, choices = _text(row, column), _text(row, "answerKey"), row.get("choices")
    if not isinstance(choices, dict) or not all(isinstance(choices.get(name), list) for name in ("text", "label")):
        raise ValueError("column 'choices' must hold {'text': [...], 'label': [...]}")
    texts, labels = _texts(choices["text"], "choices.text"), _texts(choices["label"], "choices.label")
    if len(texts) != len(labels) or len(texts) < 2 or len(set(labels)) != len(labels):
        raise ValueError(f"{len(texts)} choices with labels {list(labels)}: every choice needs its own label")
    if answer not in labels:
        raise ValueError(f"answerKey {answer!r} is none of the labels {list(labels)}")
    return {"text": text, "choices": texts, "labels": labels, "answer": answer}


def _parse_openbookqa(row: dict[str, Any]) -> dict[str, Any]:
    """A row of openbookqa: question_stem, choices {text, label}, answerKey."""
    return _parse_choice(row, "question_stem")


def _lettered(text: str, choices: Sequence[str], gold: Any, first: int = 0, context: str = "") -> dict[str, Any]:
    """Fields of a question whose options have no labels of their own; `gold` counts them from `first`."""
    try:
        index = int(gold) - first
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < len(choices):
        raise ValueError(f"label is {gold!r}, expected {first} to {first + len(choices) - 1}")
    labels = tuple(string.ascii_uppercase[: len(choices)])
    return {"text": text, "choices": tuple(choices), "labels": labels, "answer": labels[index], "context": context}


def _parse_piqa(row: dict[str, Any]) -> dict[str, Any]:
    """A row of piqa: goal, sol1, sol2, label 0 or 1."""
    return _lettered(_text(row, "goal"), [_text(row, "sol1"), _text(row, "sol2")], row.get("label"))


def _parse_siqa(row: dict[str, Any]) -> dict[str, Any]:
    """A row of siqa: context, question, answerA, answerB, answerC, label 1 to 3."""
    choices = [_text(row, f"answer{letter}") for letter in "ABC"]
    return _lettered(_text(row, "question"), choices, row.get("label"), first=1, context=_text(row, "context"))


def _parse_hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    """A row of hellaswag: activity_label, ctx_a, ctx_b, endings, label; cleaned as lm-eval does."""
    endings = row.get("endings")
    if not isinstance(endings, list) or len(endings) < 2:
        raise ValueError("column 'endings' must hold a list of texts")

    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = f"{_text(row, 'ctx_a')} {str(row.get('ctx_b') or '').capitalize()}"
    options = [clean(ending) for ending in _texts(endings, "endings")]
    return _lettered(clean(f"{_text(row, 'activity_label')}: {context}"), options, row.get("label"))


def _parse_truthfulqa(row: dict[str, Any]) -> dict[str, Any]:
    """A row of truthful_qa's multiple_choice: question, mc1_targets {choices, labels}; the first choice is right."""
    targets = row.get("mc1_targets")
    if not isinstance(targets, dict) or not isinstance(targets.get("choices"), list) or len(targets["choices"]) < 2:
        raise ValueError("column 'mc1_targets' must hold {'choices': [...], 'labels': [...]}")
    return _lettered(_text(row, "question"), _texts(targets["choices"], "mc1_targets.choices"), 0)


def _parse_dart(level: int) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    """Rows of one difficulty of dart-math-pool-math (query, gt_ans, query_metadata.level) or of MATH itself."""

    def parse(row: dict[str, Any]) -> dict[str, Any] | None:
        if "problem" in row and "query" not in row:
            row = _pool_row(row)
        metadata = row.get("query_metadata")
        if not isinstance(metadata, dict) or "level" not in metadata:
            raise ValueError("column 'query_metadata' must hold {'level': 1..5, ...}")
        given = metadata["level"]
        if given is None or given == "Level ?":  # MATH has queries without a level: they are in no set
            return None
        try:
            row_level = int(str(given).removeprefix("Level "))
        except ValueError:
            row_level = 0
        if not 1 <= row_level <= 5:
            raise ValueError(f"query_metadata.level is {given!r}, expected 1 to 5")
        if row_level != level:
            return None
        text, answer = _text(row, "query"), row.get("gt_ans", "")
        if answer == "" and "gt_ans" in row:  # a few solutions of MATH end without a boxed answer
            return None
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            row = {**row, "gt_ans": str(answer)}
        return {"text": text, "choices": (), "labels": (), "answer": _text(row, "gt_ans")}

    return parse


def _pool_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of MATH (problem, level, solution) in the schema of the pool; the answer is the solution's last box."""
    solution = row.get("solution")
    answer = last_box(solution) if isinstance(solution, str) else None
    return {"query": row["problem"], "gt_ans": answer or "", "query_metadata": {"level": row.get("level")}}


def _parse_squad(row: dict[str, Any]) -> dict[str, Any]:
    """A row of squad_v2: context, question, answers {text, answer_start}; no answer means unanswerable."""
    answers = row.get("answers")
    if not isinstance(answers, dict) or not isinstance(answers.get("text"), list):
        raise ValueError("column 'answers' must hold {'text': [...], ...}")
    spans = tuple(dict.fromkeys(_texts(answers["text"], "answers.text"))) or (UNANSWERABLE,)
    question, context = _text(row, "question"), _text(row, "context")
    return {"text": question, "context": context, "choices": spans, "labels": (), "answer": spans[0]}


_TRAIN_TEST = {"train": "train", "test": "test"}
_TRAIN_VALIDATION = {"train": "train", "test": "validation"}  # their test splits carry no answers
_DART_COLUMNS = ("query", "gt_ans", "query_metadata", "problem", "level", "solution")
_DART_SAMPLES = {1: 200, 2: 400, 3: 600, 4: 800, 5: 1000}
_MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip


def _arc(name: str, hub_config: str, samples: int) -> TaskSpec:
    source = ("allenai/ai2_arc", hub_config, _TRAIN_TEST, name)
    return TaskSpec(name, *source, "choice", _parse_choice, (2, 10), samples)


def _dart(level: int) -> TaskSpec:
    source = ("hkust-nlp/dart-math-pool-math", None, _TRAIN_TEST, "dart_math")
    # The pool has one split, made from MATH's training problems. All of it trains; MATH's own test problems test.
    test_source = ("EleutherAI/hendrycks_math", _MATH_SUBJECTS)
    return TaskSpec(f"dart-{level}", *source, "math", _parse_dart(level), (15, 15), _DART_SAMPLES[level], test_source)


def _commonsense() -> TaskSpec:
    source = ("tau/commonsense_qa", None, _TRAIN_VALIDATION, "commonsense_qa")
    return TaskSpec("commonsense", *source, "choice", _parse_choice, (2, 10), None)


def _cloze(
    name: str, hub_path: str, hub_config: str | None, splits: dict[str, str], parse: Callable[[dict[str, Any]], Any]
) -> TaskSpec:
    """A multiple-choice set that the paper does not train on."""
    return TaskSpec(name, hub_path, hub_config, splits, name, "choice", parse, (2, 10), None)


def _squadv2() -> TaskSpec:
    source = ("rajpurkar/squad_v2", None, _TRAIN_VALIDATION, "squad_v2")
    return TaskSpec("squadv2", *source, "span", _parse_squad, (15, 15), None)


SETS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        _arc("arc_easy", "ARC-Easy", 400),
        _arc("arc_challenge", "ARC-Challenge", 600),
        *(_dart(level) for level in range(1, 6)),
        _commonsense(),
        _squadv2(),
        _cloze("openbookqa", "allenai/openbookqa", "main", _TRAIN_TEST, _parse_openbookqa),
        _cloze("piqa", "baber/piqa", None, _TRAIN_VALIDATION, _parse_piqa),
        _cloze("siqa", "lighteval/siqa", None, _TRAIN_VALIDATION, _parse_siqa),
        _cloze("hellaswag", "Rowan/hellaswag", None, _TRAIN_VALIDATION, _parse_hellaswag),
        TaskSpec(
            "truthfulqa_mc1",
            "truthfulqa/truthful_qa",
            "multiple_choice",
            {"test": "validation"},
            "truthfulqa_mc",
            "choice",
            _parse_truthfulqa,
            (2, 10),
            None,
        ),
    )
}

GROUPS: dict[str, tuple[str, ...]] = {
    "arc": ("arc_easy", "arc_challenge"),
    "dart": ("dart-1", "dart-2", "dart-3", "dart-4", "dart-5"),
}


def expand_sets(names: str) -> list[str]:
    """Set names of a comma-separated list of sets and groups, in order, each once.

    >>> expand_sets("arc,dart-1")
    ['arc_easy', 'arc_challenge', 'dart-1']
    """
    sets: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name in GROUPS:
            sets.extend(GROUPS[name])
        elif name in SETS:
            sets.append(name)
        else:
            raise UserError(
                f"unknown question set '{name}'; there are the groups {', '.join(GROUPS)} "
                f"and the sets {', '.join(SETS)}"
            )
    return list(dict.fromkeys(sets))


def collections_of(names: str) -> dict[str, str]:
    """For each set of a comma-separated list the name under which the list has it first.

    >>> collections_of("arc,openbookqa")
    {'arc_easy': 'arc', 'arc_challenge': 'arc', 'openbookqa': 'openbookqa'}
    """
    collections: dict[str, str] = {}
    for name in (part.strip() for part in names.split(",")):
        for member in expand_sets(name):
            collections.setdefault(member, name)
    return collections


# --------------------------------------------------------------------------------------------------------
# Reading


def load_questions(
    set_name: str, split: str = "train", data_dir: Path | str | None = None, limit: int | None = None
) -> list[Question]:
    """The distinct questions of a set, in the order of their source, at most `limit`.

    Args:
        set_name: one of `SETS`.
        split: "train" or "test".
        data_dir: folder of local files; without it the rows come from the Hub.
        limit: stop after this number of distinct questions.

    A repeated question (the DART pool repeats each query many times) is kept once.

    Raises:
        UserError: for an unknown set or split, a missing file or column, and unusable rows, naming file and line.
    """
    if set_name not in SETS:
        expand_sets(set_name)  # raises for what does not exist
        raise UserError(f"'{set_name}' is a group; load one of its sets: {', '.join(GROUPS[set_name])}")
    spec = SETS[set_name]
    if split not in spec.splits:
        raise UserError(f"{set_name} has no split '{split}'; it has {' and '.join(spec.splits)}")
    if data_dir is None:
        # Nearly all bytes of the DART pool are responses, which are not needed, and its questions are repeated.
        columns = _DART_COLUMNS if spec.stem == "dart_math" else ()
        rows: Iterable[tuple[str, Any]] = hub_rows(*_hub_source(spec, split), spec.splits[split], columns)
    else:
        rows = _local_rows(spec, Path(data_dir), spec.splits[split])
    questions: dict[str, Question] = {}
    for location, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError("expected an object with the columns of the data set")
            fields = spec.parse(row)
        except ValueError as error:
            raise UserError(f"{location}: {error}") from None
        if fields is None:
            continue
        question = Question(set=spec.name, id=_question_id(spec, fields), **fields)
        questions.setdefault(question.id, question)
        if limit is not None and len(questions) >= limit:
            break
    if not questions:
        source = _hub_source(spec, split)[0] if data_dir is None else f"{data_dir}/{spec.stem}_{spec.splits[split]}"
        raise UserError(f"{source} has no question of the set '{set_name}'")
    return list(questions.values())


def _question_id(spec: TaskSpec, fields: dict[str, Any]) -> str:
    """A hash of the question with its choices and context; white space is normalised, the answer is left out."""
    options = () if spec.kind == "span" else fields["choices"]
    parts = [spec.name, fields.get("context", ""), fields["text"], *options]
    content = "\x1f".join(" ".join(part.split()) for part in parts)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _hub_source(spec: TaskSpec, split: str) -> tuple[str, tuple[str | None, ...]]:
    """(Hub path, configurations) of a split."""
    if split == "test" and spec.test_source is not None:
        return spec.test_source
    return spec.hub_path, (spec.hub_config,)


def _local_rows(spec: TaskSpec, folder: Path, split: str) -> Iterable[tuple[str, Any]]:
    if not folder.is_dir():
        problem = "is a file; pass its folder" if folder.exists() else "does not exist"
        raise UserError(f"data folder {folder} {problem}")
    stem = f"{spec.stem}_{split}"
    for suffix, read in ((".jsonl", _read_jsonl), (".json", _read_json), (".parquet", _read_parquet)):
        path = folder / (stem + suffix)
        if path.is_file():
            return read(path)
    raise UserError(f"data folder {folder} has no {stem}.jsonl (nor .json, .parquet) with rows of {spec.hub_path}")


_ICONV = "iconv -f ENCODING -t UTF-8 FILE > NEW_FILE"


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        encoding = json.detect_encoding(file.read(4))
        if not encoding.startswith("utf-8"):
            raise UserError(f"{path}: the file is {encoding.upper()}, expected UTF-8; convert it: {_ICONV}")
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            location = f"{path}:{number}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise UserError(f"{location}: not UTF-8 ({error}); convert the file: {_ICONV}") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{location}: not valid JSON ({error}); is the file cut off?") from None
            yield location, row


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); convert the file: {_ICONV}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); name it .jsonl if it holds one object per line") from None
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows; name it .jsonl if it holds one object per line")
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except Exception as error:
        raise UserError(f"{path}: not a readable parquet file ({type(error).__name__}: {error})") from None
    for number, row in enumerate(table.to_pylist()):
        yield f"{path}, row {number}", row
