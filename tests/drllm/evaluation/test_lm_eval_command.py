import json
import sys

import pytest
from lm_eval import tasks as lm_eval_tasks
from lm_eval.models.utils import normalize_gen_kwargs

from drllm import evaluate
from drllm.errors import UserError
from drllm.evaluation.lm_eval_command import TASKS_FOLDER, lm_eval_arguments, skip_catalogue


def test_arguments_for_lm_eval(tmp_path):
    arguments = lm_eval_arguments(
        [
            "--model_args",
            "pretrained=x,dtype=float32",
            "--use_cache",
            "c.db",
            "--data_dir",
            str(tmp_path),
            "--tasks",
            "t",
        ]
    )
    joined = " ".join(arguments)
    assert "--model drllm --model_args pretrained=x,dtype=float32,response_cache=c.db" in joined
    metadata = json.loads(arguments[arguments.index("--metadata") + 1])
    assert metadata == {"data_dir": str(tmp_path)}
    assert "--use_cache" not in joined
    assert "eval_tasks" in joined
    kept = " ".join(lm_eval_arguments(["--model", "hf", "--use_cache", "c.db", "--tasks", "t"]))
    assert "--use_cache c.db" in kept
    assert "--batch_size 8" in joined
    assert "--batch_size" not in kept
    for given in (["--batch_size=2"], ["-b", "2"]):
        assert " ".join(lm_eval_arguments([*given, "--tasks", "t"])).count("--batch_size 2") == 1
    for flag in ("-M", "--model"):
        others = lm_eval_arguments([flag, "hf", "-a", "pretrained=x", "--tasks", "t"])
        assert others[-4:] == ["--model", "hf", "--model_args", "pretrained=x"]
        assert "-M" not in others
        assert "--batch_size" not in others
    with pytest.raises(UserError, match=r"--data_dir .*nowhere does not exist"):
        lm_eval_arguments(["--data_dir", str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("arguments", "is_needed"),
    [
        ("--tasks drllm_arc,drllm_dart_1 --limit 2", False),
        ("--tasks drllm_arc drllm_dart_1 --limit 2", False),
        ("-t drllm_arc", False),
        ("--tasks drllm_arc,piqa", True),
        ("--tasks drllm_arc piqa --limit 2", True),
        ("--tasks drllm_arc --tasks piqa", True),
        ("--tasks drllm_arc --tasks=piqa", True),
        ("--limit 2", True),
    ],
)
def test_lm_evals_catalogue_is_read_unless_all_tasks_are_ours(arguments, is_needed, monkeypatch):
    whole = lm_eval_tasks.TaskManager
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", whole)  # put back afterwards
    skip_catalogue([*arguments.split(), "--include_path", str(TASKS_FOLDER)])
    assert (lm_eval_tasks.TaskManager is whole) == is_needed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch_size 0", "--batch_size 0: must be a positive integer, auto or auto:N"),
        ("--batch_size=x", "--batch_size x"),
        ("-b -4", "--batch_size -4"),
        ("-b 1.5", "--batch_size 1.5"),
        ("--batch_size auto:x", "--batch_size auto:x"),
        ("--batch_size", "--batch_size needs a value"),
        ("--max_batch_size 0", "--max_batch_size 0: must be a positive integer"),
        ("--max_batch_size auto", "--max_batch_size auto"),
        ("--seed -1", "--seed -1: must be integers from 0 to 4294967295"),
        ("--seed 0,1,2,4294967296", "--seed"),
        ("--limit 0", "--limit 0: must be a positive number"),
        ("--limit x", "--limit x"),
        ("--num_fewshot -1", "--num_fewshot -1"),
        ("--gen_kwargs max_new_tokens=0", "max_new_tokens=0: must be a positive integer"),
        ("--gen_kwargs max_new_tokens=many", "max_new_tokens=many: must be a positive integer"),
        ("--gen_kwargs max_new_tokens=5,max_gen_toks=6", "several limits on new tokens"),
        ("--gen_kwargs temperature", "--gen_kwargs temperature: expected KEY=VALUE"),
        ("--gen_kwargs", "--gen_kwargs needs a value"),
        ("--model_args", "--model_args needs a value"),
        ("--use_cache {file}/answers.db", "--use_cache {file} is a file"),
        ("--use_cache {folder}", "--use_cache {folder} is a folder"),
        ("--output_path {file}/results", "--output_path {file}/results is below the file"),
        ("--output_path {folder}/x.json/y.json", ""),
        ("--data_dir {file}", "--data_dir {file} does not exist or is not a folder"),
        ('--use_cache {folder}/c.db --model_args {{"pretrained":"x"}}', "--model_args as JSON"),
    ],
)
def test_bad_arguments_end_before_anything_is_loaded(tmp_path, monkeypatch, capsys, arguments, message):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("")
    folder.mkdir()
    (folder / "x.json").write_text("")
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: pytest.fail("lm-eval was started"))
    monkeypatch.setattr(
        sys, "argv", ["drllm.evaluate", "--tasks", "t", *arguments.format(file=file, folder=folder).split()]
    )
    assert evaluate.main() == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert message.format(file=file, folder=folder) in error


@pytest.mark.parametrize(
    "given", [["max_new_tokens=2048,temperature=0"], ["temperature=0", "max_tokens=2048"], ['{"max_new_tokens": 2048}']]
)
def test_the_limit_of_the_command_line_wins_over_the_tasks_own(given):
    from lm_eval._cli.harness import HarnessCLI

    arguments = lm_eval_arguments(["--tasks", "t", "--gen_kwargs", *given])
    sys_argv, sys.argv = sys.argv, ["lm_eval", "run", *arguments]
    try:
        gen_kwargs = HarnessCLI().parse_args().gen_kwargs
    finally:
        sys.argv = sys_argv
    task = {"until": ["\n"], "max_gen_toks": 256}
    assert normalize_gen_kwargs(task | gen_kwargs)["max_gen_toks"] == 2048
    assert normalize_gen_kwargs(task | {"max_new_tokens": 2048})["max_gen_toks"] == 256, (
        "lm-eval alone keeps the task's"
    )


def test_other_generation_settings_reach_lm_eval_unchanged():
    settings = ["temperature=0.5,until=['a,b', \"max_new_tokens=3\"]", "top_p=0.9"]
    arguments = lm_eval_arguments(["--gen_kwargs", *settings, "--tasks", "t"])
    assert arguments[arguments.index("--gen_kwargs") + 1 :][:2] == settings


def test_a_full_disk_is_one_sentence(monkeypatch, capsys):
    def fills_the_disk():
        with open("/dev/full", "w") as file:
            file.write("x" * 10**6)

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fills_the_disk)
    monkeypatch.setattr(sys, "argv", ["drllm.evaluate", "--tasks", "drllm_arc", "--model_args", "pretrained=x"])
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", lm_eval_tasks.TaskManager)
    assert evaluate.main() == 2
    assert "no space left" in capsys.readouterr().err


def test_the_response_format_reaches_the_tasks(tmp_path):
    text = '{"max_new_tokens": {"dart-1": 20}, "inject_boxed": true}'
    arguments = lm_eval_arguments(["--tasks", "t", "--data_dir", str(tmp_path), "--response_format", text])
    metadata = json.loads(arguments[arguments.index("--metadata") + 1])
    response_format = {"max_new_tokens": {"dart-1": 20}, "inject_boxed": True, "strict_letters": False}
    assert metadata == {"data_dir": str(tmp_path), "response_format": response_format}
    for bad, message in (("boxed", "must be a JSON object"), ('{"inject_boxed": 1}', "'inject_boxed' is not true")):
        with pytest.raises(UserError, match=f"--response_format.*{message}"):
            lm_eval_arguments(["--tasks", "t", "--response_format", bad])
