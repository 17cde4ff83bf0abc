"""The question sets of the labels as lm-eval tasks, under both rewards.

* `drllm_arc_*`, `drllm_dart_*`: generated answers, ARC by option label, DART levels 1 to 5 by boxed answer.
* `drllm_ll_*`: multiple choice by log-likelihood, with the prompts, options and metrics of lm-eval's own tasks, which
  read the Hub only, while these also read local files.

Everything that defines a score (rows, prompts, response limits, graders) is `drllm/questions/`; this file adapts it
to lm-eval. Rows come from the Hub, or with `--metadata data_dir=FOLDER` from local files of the same schema
(`{FOLDER}/arc_easy_test.jsonl`, `dart_math_test.jsonl`, ...). Responses have the default format, or that of
`--metadata '{"response_format": {...}}'` (`ResponseFormat.as_dict`), which eval.sh takes from the checkpoint's labels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

# `lm_eval --include_path eval_tasks` may run from any folder, and the repository is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from drllm.questions.likelihood import likelihood_text
from drllm.questions.prompts import render_prompt
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import Question, load_questions

_FIELDS = ("set", "id", "text", "choices", "labels", "answer", "context")


def _question(doc: dict[str, Any]) -> Question:
    fields = {name: doc[name] for name in _FIELDS}
    return Question(**(fields | {"choices": tuple(doc["choices"]), "labels": tuple(doc["labels"])}))


def doc_to_text(doc: dict[str, Any]) -> str:
    """The prompt of `--reward generation` in the default response format."""
    return render_prompt(_question(doc))


def doc_to_target(doc: dict[str, Any]) -> str:
    """The gold answer: a label, or a LaTeX expression."""
    return doc["answer"]


def likelihood_context(doc: dict[str, Any]) -> str:
    """The prompt of `--reward likelihood`."""
    return likelihood_text(_question(doc))[0]


def likelihood_target(doc: dict[str, Any]) -> int:
    """The index of the gold option."""
    return doc["labels"].index(doc["answer"])


class QuestionSetTask(ConfigurableTask):
    """One question set as an lm-eval task; `dataset_kwargs.set` names the set."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    @property
    def data_dir(self) -> str | None:
        """Folder of local files (`--metadata data_dir=...`), or None for the Hub."""
        return (self.config.metadata or {}).get("data_dir")

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Loads the test questions of the set."""
        questions = load_questions(dataset_kwargs["set"], "test", self.data_dir)
        # No columns are inferred: an empty tuple of choices would become a column of nulls.
        text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
        features = {name: texts if name in ("choices", "labels") else text for name in _FIELDS}
        rows = [{name: getattr(question, name) for name in _FIELDS} for question in questions]
        self.dataset = {"test": datasets.Dataset.from_list(rows, features=datasets.Features(features))}

    def build_all_requests(self, **kwargs: Any) -> None:
        """As in lm-eval, but `--cache_requests` stays out of it: its key would not know the data folder."""
        super().build_all_requests(**(kwargs | {"cache_requests": False, "rewrite_requests_cache": False}))


class InDomainTask(QuestionSetTask):
    """A question set whose answers are generated."""

    @property
    def response_format(self) -> ResponseFormat:
        """`--metadata '{"response_format": {...}}'`, or the default."""
        return ResponseFormat.of_dict((self.config.metadata or {}).get("response_format") or {})

    def doc_to_text(self, doc: dict[str, Any], *_: Any, **__: Any) -> str:
        """The prompt, with the start of the response if the format has one."""
        return render_prompt(_question(doc), self.response_format)

    def process_results(self, doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        """Accuracy of one response, by the grader of the search."""
        return {"acc": float(self.response_format.grade(_question(doc), results[0]))}

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Instance:
        """One generation with the limit of the response format; by default ARC 2 (chat template: 10), DART 15."""
        chat = kwargs.get("apply_chat_template", False)
        request = super().construct_requests(doc, ctx, **kwargs)
        generation = request.arguments[1]
        generation.setdefault("max_gen_toks", self.response_format.limit(doc["set"], chat))  # --gen_kwargs wins
        # The search is plain greedy decoding, whatever the model's generation config says (Qwen2.5's: 1.05).
        generation.setdefault("repetition_penalty", 1.0)
        return request
