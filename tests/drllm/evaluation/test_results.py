import json

import pytest

from drllm.errors import UserError
from drllm.evaluation.results import Estimate, Run, in_domain_columns, load_runs
from tests.eval_toys import make_run


def test_results_without_files_by_question_give_the_same_numbers(two_runs):
    """What is checked in is results.json and run.json alone."""
    whole = load_runs(two_runs)
    tasks = ["drllm_arc_easy", "drllm_dart_2"]
    for run in whole:
        results = json.loads((two_runs / run.name / "results.json").read_text())
        for task in tasks:
            accuracy, layers = run.accuracy([task]), run.layers([task])
            results["results"][task] = {"acc,none": accuracy.mean, "acc_stderr,none": accuracy.stderr}
            counted = results["config"].setdefault("block_applications", {})
            counted[task] = {"blocks_per_query": layers.mean, "blocks_per_query_stderr": layers.stderr}
            counted[task]["queries"] = layers.count
        (two_runs / run.name / "results.json").write_text(json.dumps(results))
        (two_runs / run.name / "queries.jsonl").unlink()
        for samples in (two_runs / run.name / "samples").iterdir():
            samples.unlink()
    for before, after in zip(whole, load_runs(two_runs), strict=True):
        assert in_domain_columns(after) == in_domain_columns(before)
        for measure in (Run.accuracy, Run.layers):
            found, expected = measure(after, tasks), measure(before, tasks)
            assert (found.mean, found.count) == (pytest.approx(expected.mean), 6)
            assert found.stderr == pytest.approx(expected.stderr)


DAMAGE = {
    "run.json": ["", "[]", "{", '{"run": null}', '{"run": {"tasks": 3}}', "[" * 100_000],
    "results.json": ["", "3", '{"results": {}}', '{"results": [], "config": {}}'],
    "queries.jsonl": ['{"task": "cut', "3", "{}", '{"task": "t", "doc_id": "0", "blocks": 1, "paths": []}', "\xff"],
    "samples/drllm_arc_easy.jsonl": ['{"doc_id": 0, "acc', "[]", '{"acc": 1}'],
}


@pytest.mark.parametrize(("name", "content"), [(name, text) for name, texts in DAMAGE.items() for text in texts])
def test_a_damaged_file_is_named(two_runs, name, content):
    (two_runs / "router" / name).write_bytes(content.encode("latin1"))
    with pytest.raises(UserError, match=f"{name}.*run eval.sh again"):
        load_runs(two_runs)


def test_both_runs_must_be_complete(two_runs):
    (two_runs / "router" / "run.json").unlink()
    with pytest.raises(UserError, match="no complete runs base and router"):
        load_runs(two_runs)


def test_agieval_is_the_mean_of_its_subtasks(tmp_path):
    """lm-eval's group reports acc, weighted by size; the paper's table has acc_norm."""
    correct = {"agieval_aqua_rat": [1, 0], "agieval_lsat_ar": [0, 0, 0, 1]}
    folder = make_run(tmp_path, "base", correct, {task: [4] * len(values) for task, values in correct.items()})
    results = json.loads((folder / "results.json").read_text())
    results["results"] = {
        "agieval": {"acc,none": 0.99, "acc_stderr,none": 0.01},
        "agieval_aqua_rat": {"acc,none": 0.9, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.3},
        "agieval_lsat_ar": {"acc,none": 0.9, "acc_norm,none": 0.25, "acc_norm_stderr,none": 0.4},
    }
    results["group_subtasks"] = {"agieval": list(correct)}
    (folder / "results.json").write_text(json.dumps(results))
    assert Run(folder).score("agieval") == Estimate(0.375, 0.25, 6)
    assert Run(folder).reported("agieval") == Estimate(0.99, 0.01, 6)
    del results["results"]["agieval_lsat_ar"]
    (folder / "results.json").write_text(json.dumps(results))
    assert Run(folder).score("agieval") is None
