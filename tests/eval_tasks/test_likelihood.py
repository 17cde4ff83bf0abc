"""The log-likelihood tasks against lm-eval's own, on the same rows."""

import json
from pathlib import Path

import datasets
import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from drllm.evaluation.results import Run
from tests.eval_toys import EVAL_TASKS, evaluate, make_base, make_run, metrics, routed_lm, stock_lm

LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"


def _choices(texts, labels="ABCDE"):
    return {"text": texts, "label": list(labels[: len(texts)])}


ARC = [
    {"id": "1", "question": "w1 w2?", "choices": _choices(["w3", "w4 w5", "w6"]), "answerKey": "B"},
    {"id": "2", "question": "w7 w2?", "choices": _choices(["w3", "w4", "w6", "w8"], "1234"), "answerKey": "4"},
    {"id": "3", "question": 'w1 "w9" é?', "choices": _choices(["w3", "w4", "w5", "w6", "w7"]), "answerKey": "A"},
]
OPENBOOKQA = [{"id": row["id"], "question_stem": row["question"], **row} for row in ARC[::2]]
PIQA = [{"goal": f"w{n} w2", "sol1": "w1 w2 w3", "sol2": "w4", "label": n % 2} for n in range(3)]
SIQA = [
    {"context": f"w{n} w2.", "question": "w3?", "answerA": "w4 w5", "answerB": "w6", "answerC": "w7", "label": str(n)}
    for n in (1, 2, 3)
]
HELLASWAG = [
    {
        "activity_label": f"w{n}",
        "ctx_a": "[header] w2  w3 [title] w4.",
        "ctx_b": ctx_b,
        "endings": ["w4 [step] w5.", " w5 [title] w6", "w6  w7", "w8"],
        "label": f"{n}",
    }
    for n, ctx_b in ((0, "then w5"), (3, ""))
]
TRUTHFULQA = [
    {
        "question": f"w1 w{n}?",
        "mc1_targets": {"choices": ["w2", "w3 w1", *(["w4"] * n)], "labels": [1, *([0] * (n + 1))]},
        "mc2_targets": {"choices": ["w2"], "labels": [1]},
    }
    for n in range(3)
]

# set -> lm-eval's folder and task, name of our local file, rows
SETS = {
    "arc_easy": ("arc", "arc_easy", "arc_easy_test", ARC),
    "arc_challenge": ("arc", "arc_challenge", "arc_challenge_test", ARC),
    "openbookqa": ("openbookqa", "openbookqa", "openbookqa_test", OPENBOOKQA),
    "piqa": ("piqa", "piqa", "piqa_validation", PIQA),
    "siqa": ("siqa", "social_iqa", "siqa_validation", SIQA),
    "hellaswag": ("hellaswag", "hellaswag", "hellaswag_validation", HELLASWAG),
    "truthfulqa_mc1": ("truthfulqa", "truthfulqa_mc1", "truthfulqa_mc_validation", TRUTHFULQA),
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Makes the rows of a set what the Hub holds, and a local file; returns the folder of the latter."""

    def write(name):
        _, _, stem, rows = SETS[name]
        (tmp_path / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = datasets.Dataset.from_list(rows)
        splits = dict.fromkeys(("train", "validation", "test"), dataset)
        monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: datasets.DatasetDict(splits))
        return tmp_path

    return write


def _load(folder, name, **metadata):
    return TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata).load([name])["tasks"][name]


def _requests(task):
    task.build_all_requests(rank=0, world_size=1)
    return [(request.doc_id, request.request_type, request.args) for request in task.instances]


@pytest.mark.parametrize("name", SETS)
def test_prompts_options_and_targets_are_lm_evals_own(data, name):
    folder, task_name, _, rows = SETS[name]
    local = data(name)
    theirs = _load(LM_EVAL_TASKS / folder, task_name)
    ours = _load(EVAL_TASKS, f"drllm_ll_{name}", data_dir=str(local))
    assert _requests(ours) == _requests(theirs)
    documents = list(zip(ours.eval_docs, theirs.eval_docs, strict=True))
    assert len(documents) == len(rows)
    for mine, other in documents:
        assert list(ours.doc_to_choice(mine)) == list(theirs.doc_to_choice(other))
        assert ours.doc_to_target(mine) == int(theirs.doc_to_target(other))
    assert {metric["metric"] for metric in theirs.config.metric_list} <= {"acc", "acc_norm"}
    assert {metric["metric"] for metric in ours.config.metric_list} == {"acc", "acc_norm"}
    assert ours.config.num_fewshot == (theirs.config.num_fewshot or 0)


def test_every_task_reads_the_set_of_its_name(data):
    files = {path.stem.removeprefix("drllm_ll_") for path in EVAL_TASKS.glob("drllm_ll_*.yaml")}
    assert files == {*SETS, "commonsense"}
    rows = [{**row, "choices": _choices(["w1", "w2", "w3", "w4", "w5"]), "answerKey": "C"} for row in ARC]
    folder = data("arc_easy")
    (folder / "commonsense_qa_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # lm-eval's commonsense_qa scores letters; ours scores the options with the prompt of arc_easy
    task = _load(EVAL_TASKS, "drllm_ll_commonsense", data_dir=str(folder))
    assert _requests(task)[2] == (0, "loglikelihood", ("Question: w1 w2?\nAnswer:", " w3"))


def test_scores_are_lm_evals_own(data, tmp_path_factory, stock_model):
    """Static routing, batch 1: acc and acc_norm of our task and of lm-eval's, by our model and by lm-eval's `hf`."""
    base = make_base(tmp_path_factory.mktemp("base"), stock_model)
    local = data("arc_easy")
    expected = metrics(evaluate(stock_lm(base), LM_EVAL_TASKS / "arc", ["arc_easy"]))["arc_easy"]
    for lm in (stock_lm(base), routed_lm(base, 4)):
        assert metrics(evaluate(lm, local, ["drllm_ll_arc_easy"]))["drllm_ll_arc_easy"] == expected


@pytest.mark.parametrize(("reward", "expected"), [("likelihood", 0.5), ("likelihood_norm", 0.25), (None, 0.5)])
def test_tables_show_the_metric_of_the_reward(tmp_path, reward, expected):
    folder = make_run(tmp_path, "base", {"drllm_ll_piqa": [1, 0]}, {"drllm_ll_piqa": [4, 4]})
    results = json.loads((folder / "results.json").read_text())
    results["results"]["drllm_ll_piqa"] |= {"acc_norm,none": 0.25}
    (folder / "results.json").write_text(json.dumps(results))
    record = json.loads((folder / "run.json").read_text())
    record["run"] |= {"reward": reward} if reward else {}
    (folder / "run.json").write_text(json.dumps(record))
    assert Run(folder).score("drllm_ll_piqa").mean == expected
