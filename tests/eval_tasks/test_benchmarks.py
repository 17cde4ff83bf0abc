"""Every benchmark of the paper, offline, on rows of its schema made here."""

import json
from pathlib import Path

import datasets
import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from drllm.tables import benchmarks
from tests.eval_toys import EVAL_TASKS, evaluate, make_base, make_routed, routed_lm

LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"

# lm-eval's folder of each task, a task to run (of groups one member), and two rows of its data set.
ROWS = {
    "mmlu": (
        "mmlu/default",
        "mmlu_anatomy",
        [{"question": "w1 w2", "choices": ["w1", "w2", "w3", "w4"], "answer": answer} for answer in (0, 3)],
    ),
    "gsm8k": (
        "gsm8k",
        "gsm8k",
        [{"question": f"w1 w{n}", "answer": f"w2 <<1+{n}={1 + n}>> w3\n#### {1 + n}"} for n in range(8)],
    ),
    "aime24": ("aime", "aime24", [{"ID": f"{n}", "Problem": f"w{n} w5", "Answer": n} for n in (25, 110)]),
    "truthfulqa_mc1": (
        "truthfulqa",
        "truthfulqa_mc1",
        [
            {
                "question": f"w1 w{n}",
                "mc1_targets": {"choices": ["w2", "w3", "w4 w5"], "labels": [1, 0, 0]},
                "mc2_targets": {"choices": ["w2", "w3"], "labels": [1, 0]},
            }
            for n in range(2)
        ],
    ),
    "gpqa_diamond_zeroshot": (
        "gpqa/zeroshot",
        "gpqa_diamond_zeroshot",
        [
            {"Question": f"w{n}", "Correct Answer": "w1", **{f"Incorrect Answer {k}": f"w{k + 1}" for k in (1, 2, 3)}}
            for n in range(2)
        ],
    ),
    "agieval": (
        "agieval",
        "agieval_aqua_rat",
        [{"query": f"w1 w{n}", "choices": ["A", "B", "C"], "gold": [n]} for n in range(2)],
    ),
    "piqa": ("piqa", "piqa", [{"goal": f"w{n}", "sol1": "w1 w2", "sol2": "w3", "label": n} for n in (0, 1)]),
    "hellaswag": (
        "hellaswag",
        "hellaswag",
        [
            {"activity_label": "w1", "ctx_a": "w2", "ctx_b": "w3", "endings": ["w4", "w5", "w6 w7", "w8"], "label": "2"}
            for _ in range(2)
        ],
    ),
}
NEEDS_A_DOWNLOAD = {"squadv2", "humaneval"}  # their metrics are programs that `evaluate` fetches from the Hub


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, stock_model):
    base = make_base(tmp_path_factory.mktemp("base"), stock_model)
    return make_routed(base, tmp_path_factory.mktemp("routed"))


def test_every_benchmark_is_run_here_or_named_as_needing_a_download():
    ours = {benchmark["task"] for benchmark in benchmarks() if benchmark["task"].startswith("drllm_")}
    assert len(ours) == 7
    assert {benchmark["task"] for benchmark in benchmarks()} == ours | ROWS.keys() | NEEDS_A_DOWNLOAD
    for task in ours:
        assert (EVAL_TASKS / f"{task}.yaml").is_file()


@pytest.mark.parametrize("benchmark", [b for b in benchmarks() if b["task"] in ROWS], ids=lambda b: b["task"])
def test_benchmark_runs_offline_on_rows_of_its_schema(benchmark, checkpoint, monkeypatch):
    folder, task, rows = ROWS[benchmark["task"]]
    # JSON and back, so that every row is what a file of the data set would give
    dataset = datasets.Dataset.from_list(json.loads(json.dumps(rows)))
    splits = dict.fromkeys(("train", "validation", "test", "dev"), dataset)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: datasets.DatasetDict(splits))
    manager = TaskManager(include_path=str(LM_EVAL_TASKS / folder), include_defaults=False)
    loaded = manager.load([task])
    config = loaded["tasks"][task].config
    assert (config.num_fewshot or 0) == benchmark["shots"]
    limit = (config.generation_kwargs or {}).get("max_gen_toks")
    if benchmark["max_new_tokens"] is None:
        assert config.output_type == "multiple_choice"
    else:
        assert config.output_type == "generate_until"
        assert limit in (None, benchmark["max_new_tokens"])  # lm-eval's default is 256
    short = None if benchmark["max_new_tokens"] is None else "max_gen_toks=5"
    results = evaluate(routed_lm(checkpoint, 4), LM_EVAL_TASKS / folder, [task], gen_kwargs=short)
    assert 0 <= results["results"][task][benchmark["metric"]] <= 1
    assert results["config"]["block_applications"][task]["queries"] == len(rows)


def test_code_is_run_only_when_allowed():
    text = (LM_EVAL_TASKS / "humaneval" / "humaneval.yaml").read_text()
    assert "unsafe_code: true" in text
    (humaneval,) = [benchmark for benchmark in benchmarks() if benchmark["task"] == "humaneval"]
    assert humaneval["runs_code"]
