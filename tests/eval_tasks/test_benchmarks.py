"""Every benchmark of the paper, offline, on rows of its schema made here."""

import json
from pathlib import Path

import datasets
import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from drllm.evaluation.results import benchmarks
from tests.eval_toys import EVAL_TASKS, HookCounter, evaluate, make_base, make_routed, routed_lm

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

SQUAD = [
    {
        "id": f"{n}",
        "title": "w1",
        "context": "w2 w3 w4",
        "question": f"w{n}",
        # a data set infers no column of texts from empty lists alone
        "answers": {"text": ["w3"][:n], "answer_start": [3][:n]},
    }
    for n in (1, 0)
]
HUMANEVAL = [
    {
        "task_id": f"HumanEval/{n}",
        "prompt": f"def w{n}(w1):\n",
        "canonical_solution": "    return w1\n",
        "test": f"def check(candidate):\n    assert candidate({n}) == {n}\n",
        "entry_point": f"w{n}",
    }
    for n in range(2)
]
# their metrics are programs that `evaluate` fetches from the Hub; stand-ins take their place here
METRIC_OF_THE_HUB = {"squadv2", "humaneval"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, stock_model):
    base = make_base(tmp_path_factory.mktemp("base"), stock_model)
    return make_routed(base, tmp_path_factory.mktemp("routed"))


def test_every_benchmark_is_run_here():
    ours = {benchmark["task"] for benchmark in benchmarks() if benchmark["task"].startswith("drllm_")}
    assert len(ours) == 7
    assert {benchmark["task"] for benchmark in benchmarks()} == ours | ROWS.keys() | METRIC_OF_THE_HUB
    for task in ours:
        assert (EVAL_TASKS / f"{task}.yaml").is_file()


def _serve(rows, monkeypatch):
    """Makes `rows` what any data set of the Hub holds, in all splits."""
    # JSON and back, so that every row is what a file of the data set would give
    dataset = datasets.Dataset.from_list(json.loads(json.dumps(rows)))
    splits = dict.fromkeys(("train", "validation", "test", "dev"), dataset)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: datasets.DatasetDict(splits))


@pytest.mark.parametrize("benchmark", [b for b in benchmarks() if b["task"] in ROWS], ids=lambda b: b["task"])
def test_benchmark_runs_offline_on_rows_of_its_schema(benchmark, checkpoint, monkeypatch):
    folder, task, rows = ROWS[benchmark["task"]]
    _serve(rows, monkeypatch)
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


def test_squadv2_runs_offline_on_rows_of_its_schema(checkpoint, monkeypatch):
    asked = []

    class Metric:
        def compute(self, predictions, references, **options):
            asked.append((predictions, references))
            return {"f1": 50.0}

    monkeypatch.setattr("evaluate.load", lambda name: {"squad_v2": Metric()}[name])
    _serve(SQUAD, monkeypatch)
    (benchmark,) = [benchmark for benchmark in benchmarks() if benchmark["task"] == "squadv2"]
    lm = routed_lm(checkpoint, 1)
    monkeypatch.setattr(type(lm), "max_gen_toks", 5)  # the task leaves it to the model
    counter = HookCounter(lm.model)
    results = evaluate(lm, LM_EVAL_TASKS / "squadv2", ["squadv2"])
    assert results["results"]["squadv2"][benchmark["metric"]] == 50.0  # in percent, unlike the others
    predictions, references = asked[0]
    assert [reference["answers"]["text"] for reference in references] == [["w3"], []]
    assert all(0 <= prediction["no_answer_probability"] <= 1 for prediction in predictions)
    # a document is a generation and a log-likelihood, and both are counted
    counted = results["config"]["block_applications"]["squadv2"]
    assert counted["queries"] == 2
    assert counted["blocks"] == counter.rows


def test_humaneval_runs_offline_and_code_only_when_allowed(checkpoint, monkeypatch):
    judged = []

    class Metric:
        def compute(self, references, predictions, k):
            judged.extend(zip(references, predictions, strict=True))
            return {"pass@1": 0.5}, None

    monkeypatch.setattr("evaluate.load", lambda name: {"code_eval": Metric()}[name])
    _serve(HUMANEVAL, monkeypatch)
    (benchmark,) = [benchmark for benchmark in benchmarks() if benchmark["task"] == "humaneval"]
    assert benchmark["runs_code"]

    def run(**options):
        folder = LM_EVAL_TASKS / "humaneval"
        return evaluate(routed_lm(checkpoint, 4), folder, ["humaneval"], gen_kwargs="max_gen_toks=5", **options)

    with pytest.raises(ValueError, match="marked as unsafe"):
        run()
    judged.clear()  # the task tries its metric when it is loaded
    results = run(confirm_run_unsafe_code=True)
    assert results["results"]["humaneval"][benchmark["metric"]] == 0.5
    assert results["config"]["block_applications"]["humaneval"]["queries"] == 2
    for row, (reference, (candidate,)) in zip(HUMANEVAL, judged[-2:], strict=True):
        assert candidate.startswith(row["prompt"])
        assert reference == f"{row['test']}\ncheck({row['entry_point']})"
