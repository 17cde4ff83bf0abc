import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from drllm import evaluate
from drllm.errors import UserError
from drllm.evaluation import eval_sh as program
from drllm.evaluation import lm_eval_process
from drllm.evaluation.results import in_domain_columns, layers_difference, load_runs
from drllm.questions.grading import GRADER_VERSION
from tests.eval_toys import make_routed, make_tasks

ROOT = Path(__file__).parents[3]
BLOCKS = 6


@pytest.fixture
def checkpoint(routed):
    return routed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tasks(tmp_path_factory.mktemp("data"), count=2)


@pytest.fixture
def launches(monkeypatch):
    """Runs lm-eval in this process rather than in a fresh one; the list of what was launched."""
    launched = []

    def launch(command, log):
        assert command[:3] == [sys.executable, "-m", "drllm.evaluate"]
        launched.append(command)
        monkeypatch.setattr(sys, "argv", ["drllm.evaluate", *command[3:]])
        log.write_text("")
        return evaluate.main()

    monkeypatch.setattr(lm_eval_process, "launch", launch)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # runs pip, seconds each time
    # its handlers would outlive the streams that pytest captures
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    return launched


@pytest.fixture
def eval_sh(monkeypatch):
    def run(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["eval.sh", *map(str, arguments)])
        return program.main()

    return run


def test_both_runs_a_table_and_figures_and_again_nothing(checkpoint, data, tmp_path, launches, eval_sh, capsys):
    arguments = [checkpoint, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu", "--batch_size", 4]
    arguments += ["--path", "011111"]
    assert eval_sh(*arguments) == 0
    assert len(launches) == 3
    printed = capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[:7]] == [
        "", "-" * 20, "base", "+ router", "difference", "static path 011111", "difference",
    ]  # fmt: skip
    assert rows[2] in printed
    assert "./eval.sh" in table
    base_run, router = load_runs(tmp_path)[:2]
    tasks = in_domain_columns(base_run)["Total"]
    assert len(tasks) == 7
    assert base_run.layers(tasks).count == 14
    for task in tasks:
        assert all(query["blocks"] == BLOCKS * query["passes"] for query in base_run.queries[task].values())
    difference = layers_difference(base_run, router, tasks)
    assert difference.mean == pytest.approx(router.layers(tasks).mean - base_run.layers(tasks).mean)
    for name in ("accuracy_layers", "usage", "usage_thirds"):
        assert f"figures/{name}.png" in printed
        assert (tmp_path / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*/answers.db*"))

    assert eval_sh(*arguments) == 0
    assert len(launches) == 3
    assert "router: complete, kept" in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == table

    assert eval_sh(*arguments, "--limit", 2) == 2
    assert "holds a run that differs in: limit" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drllm.evaluation.eval_sh.GRADER_VERSION", GRADER_VERSION + 1)
        assert eval_sh(*arguments) == 2
    assert "holds a run that differs in: grader_version" in capsys.readouterr().err
    record = json.loads((tmp_path / "router" / "run.json").read_text())
    assert record["run"]["grader_version"] == router.results["config"]["grader_version"] == GRADER_VERSION
    older = json.dumps(record | {"run": record["run"] | {"grader_version": GRADER_VERSION - 1}})
    (tmp_path / "router" / "run.json").write_text(older)
    with pytest.raises(UserError, match=f"base: {GRADER_VERSION}, router: {GRADER_VERSION - 1}, path"):
        load_runs(tmp_path)
    assert eval_sh(*arguments[:-2], "--limit", 2, "--overwrite", "--tasks", "drllm_arc") == 0
    assert "Only the first 2 questions" in (tmp_path / "table.md").read_text()


def test_a_stopped_evaluation_continues(base, checkpoint, data, tmp_path, launches, eval_sh, monkeypatch, capsys):
    arguments = [checkpoint, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu", "--base", base]
    arguments += ["--tasks", "drllm_arc_easy"]
    launch = lm_eval_process.launch

    def stops_at_the_router(command, log):
        if str(checkpoint) in " ".join(command):
            log.write_text("Traceback ...\nerror: out of memory\n")
            return 2
        return launch(command, log)

    monkeypatch.setattr(lm_eval_process, "launch", stops_at_the_router)
    assert eval_sh(*arguments) == 2
    assert "lm-eval ended with status 2: out of memory" in capsys.readouterr().err
    monkeypatch.setattr(lm_eval_process, "launch", launch)
    assert eval_sh(*arguments) == 0
    assert "base: complete, kept" in capsys.readouterr().out
    assert len(launches) == 2


def test_several_checkpoints_share_the_base_run(base, checkpoint, data, tmp_path, launches, eval_sh, capsys):
    other = make_routed(base, tmp_path / "seed1", seed=1)
    arguments = ["--data_dir", data, "--output_dir", tmp_path / "out", "--device", "cpu", "--tasks", "drllm_arc"]
    assert eval_sh(checkpoint, other, *arguments) == 0
    assert len(launches) == 3
    assert f"pretrained={other}," in " ".join(launches[2])
    loaded = load_runs(tmp_path / "out")
    assert [run.name for run in loaded] == ["base", "router", "router-2"]
    accuracies = [100 * run.accuracy(["drllm_arc_easy", "drllm_arc_challenge"]).mean for run in loaded[1:]]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| + router, 2 seeds")]
    assert float(line.split("|")[2].split("±")[0]) == pytest.approx(sum(accuracies) / 2, abs=0.01)

    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"base_model_fingerprint": "another"}))
    assert eval_sh(checkpoint, other, *arguments) == 2
    assert "have different base models" in capsys.readouterr().err


def test_a_baseline_of_another_folder_is_used_if_it_is_the_same(
    base, checkpoint, data, tmp_path, launches, eval_sh, capsys
):
    other = make_routed(base, tmp_path / "seed1", seed=1)
    arguments = ["--data_dir", data, "--device", "cpu", "--tasks", "drllm_arc"]
    assert eval_sh(checkpoint, *arguments, "--output_dir", tmp_path / "first") == 0
    weights = load_runs(tmp_path / "first")[0].results["config"]["model_fingerprint"]
    config = json.loads((other / "config.json").read_text()) | {"base_model_fingerprint": weights}
    (other / "config.json").write_text(json.dumps(config))
    shared = ["--base_results", tmp_path / "first", "--output_dir", tmp_path / "second"]
    assert eval_sh(other, *arguments, *shared) == 0
    assert eval_sh(other, *arguments, *shared) == 0, "the same command again"
    assert len(launches) == 3
    assert f"pretrained={other}," in " ".join(launches[2])
    first, second = (load_runs(tmp_path / name)[0] for name in ("first", "second"))
    assert first.results == second.results

    assert eval_sh(other, *arguments, *shared[:2], "--limit", 1, "--output_dir", tmp_path / "third") == 2
    assert "its baseline differs in: limit; omit --base_results" in capsys.readouterr().err
    (other / "config.json").write_text(json.dumps(config | {"base_model_fingerprint": "another"}))
    assert eval_sh(other, *arguments, *shared[:2], "--output_dir", tmp_path / "third") == 2
    assert "its base weights are" in capsys.readouterr().err
    (tmp_path / "first" / "base" / "run.json").unlink()
    assert eval_sh(other, *arguments, *shared[:2], "--output_dir", tmp_path / "third") == 2
    assert "run.json" in capsys.readouterr().err
    assert len(launches) == 3


def test_tasks_with_settings_of_their_own_are_one_run(checkpoint, data, tmp_path, launches, eval_sh):
    """DART with its own limit takes a second lm-eval process; results, samples and queries are merged."""
    arguments = [checkpoint, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu"]
    arguments += ["--tasks", "drllm_arc_easy,drllm_dart", "--dart_max_new_tokens", 3]
    assert eval_sh(*arguments) == 0
    assert len(launches) == 4
    base_run, router = load_runs(tmp_path)
    for run in (base_run, router):
        assert run.tasks == run.correct.keys() == {"drllm_arc_easy", *(f"drllm_dart_{n}" for n in range(1, 6))}
        assert run.results["results"].keys() > run.tasks
        passes = [query["passes"] for task in run.tasks for query in run.queries[task].values() if "dart" in task]
        assert 0 < max(passes) <= 3
        assert [part["gen_kwargs"] for part in run.record["run"]["parts"]] == [None, "max_gen_toks=3"]
    assert base_run.layers(["drllm_dart"]) is None
    assert (
        "drllm_dart: without chat template, generation settings max_gen_toks=3." in (tmp_path / "table.md").read_text()
    )
    assert len((tmp_path / "router" / "command.txt").read_text().splitlines()) == 2
    assert not (tmp_path / "router" / "parts").exists()


def test_responses_have_the_format_of_the_labels(checkpoint, data, tmp_path, eval_sh, capsys):
    routed = shutil.copytree(checkpoint, tmp_path / "routed")
    recorded = {"max_new_tokens": {"dart-1": 4}, "inject_boxed": True, "strict_letters": False}
    (routed / "labels_manifest.json").write_text(json.dumps({"chat_template": False, "arguments": recorded}))
    output = tmp_path / "out"
    assert (
        eval_sh(routed, "--data_dir", data, "--output_dir", output, "--device", "cpu", "--tasks", "drllm_dart_1") == 0
    )
    sentence = (
        "drllm_dart_1: without chat template, response format of the labels (dart-1 at most 4 new tokens, math prompts "
        r"end with \boxed{)."
    )
    assert sentence in capsys.readouterr().out
    assert sentence in (output / "table.md").read_text()
    for run in load_runs(output):
        assert [part["response_format"] for part in run.record["run"]["parts"]] == [recorded]
        assert max(query["passes"] for query in run.queries["drllm_dart_1"].values()) == 4
    samples = (output / "router" / "samples" / "drllm_dart_1.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["arguments"]["gen_args_0"]["arg_0"] for line in samples]
    assert all(prompt.endswith(r"\boxed{") for prompt in prompts)


CUT_OFF = {
    "results.json is cut": lambda results, samples: results.write_bytes(results.read_bytes()[:1000]),
    "results.json is missing": lambda results, samples: results.unlink(),
    "a sample is cut": lambda results, samples: samples.write_bytes(samples.read_bytes()[:-5]),
    "samples are missing": lambda results, samples: samples.write_text(samples.read_text().splitlines()[0] + "\n"),
}


@pytest.fixture(params=CUT_OFF.values(), ids=CUT_OFF.keys())
def full_disk(request, launches, tmp_path):
    """lm-eval logs that it could not save and exits with 0; calling the fixture frees the disk."""
    launch = lm_eval_process.launch

    def cut_off(command, log):
        status = launch(command, log)
        parts = tmp_path / "base" / "parts"
        request.param(*parts.rglob("results_*.json"), *parts.rglob("samples_*.jsonl"))
        return status

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval_process, "launch", cut_off)
        yield patch.undo


def test_what_a_full_disk_cut_off_is_not_a_result(checkpoint, data, tmp_path, launches, eval_sh, full_disk, capsys):
    arguments = [checkpoint, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu"]
    arguments += ["--tasks", "drllm_arc_easy"]
    assert eval_sh(*arguments) == 2
    assert "run the same command to resume" in capsys.readouterr().err
    assert not (tmp_path / "base" / "run.json").exists()
    assert (tmp_path / "base" / "answers.db").is_file()
    full_disk()
    assert eval_sh(*arguments) == 0
    assert len(launches) == 3


def test_a_damaged_record_is_named_and_may_be_replaced(checkpoint, data, tmp_path, launches, eval_sh, capsys):
    arguments = [checkpoint, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu"]
    arguments += ["--tasks", "drllm_arc_easy"]
    for content in ("", "[]", "{}", '{"run": 3}'):
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base" / "run.json").write_text(content)
        assert eval_sh(*arguments) == 2
        error = capsys.readouterr().err
        assert "run.json" in error
        assert "pass --overwrite" in error
    assert not launches
    assert eval_sh(*arguments, "--overwrite") == 0


@pytest.mark.parametrize("name", ["results.json", "queries.jsonl", "answers.db", "run.json"])
def test_a_folder_in_the_place_of_a_file_is_found_before_any_work(
    checkpoint, data, tmp_path, launches, eval_sh, capsys, name
):
    (tmp_path / "base" / name).mkdir(parents=True)
    arguments = [checkpoint, "--data_dir", data, "--output_dir", tmp_path, "--tasks", "drllm_arc_easy", "--overwrite"]
    assert eval_sh(*arguments) == 2
    error = capsys.readouterr().err
    assert name in error
    assert len(error.splitlines()) == 1
    assert not launches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch_size 0", "--batch_size 0: must be a positive integer, auto or auto:N"),
        ("--batch_size x", "--batch_size x"),
        ("--limit 0", "--limit 0: must be at least 1"),
        ("--num_processes 0", "--num_processes 0: must be at least 1"),
        ("--num_fewshot -1", "--num_fewshot -1: must be at least 0"),
        ("--dart_max_new_tokens 0", "--dart_max_new_tokens 0: must be at least 1"),
        ("--dtype float12", "unknown dtype 'float12'"),
        ("--gen_kwargs max_new_tokens=x", "max_new_tokens=x: must be a positive integer"),
        ("--chat_template gsm8k", "--chat_template gsm8k: neither auto, on or off, nor among --tasks"),
        ("--tasks ,", "--tasks is empty"),
        ("--path 012", "path=012: must have one digit"),
        ("--path 000000", "run at least one"),
        ("--data_dir {file}", "--data_dir {file} does not exist or is not a folder"),
        ("--labels {file}", "--labels {file} does not exist or is not a folder"),
        ("--output_dir {file}", "--output_dir {file} is a file"),
        ("--output_dir {file}/below", "--output_dir {file}/below is below the file"),
    ],
)
def test_bad_arguments_end_before_any_work(checkpoint, data, tmp_path, launches, eval_sh, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    places = {"file": tmp_path / "file"}
    given = ["--data_dir", data, "--output_dir", tmp_path / "out", *arguments.format(**places).split()]
    assert eval_sh(checkpoint, *given) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error
    assert len(error.splitlines()) == 1
    assert not launches
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"model_type": 3}', '{"model_type": null}', "{"])
def test_a_damaged_checkpoint_is_one_sentence(checkpoint, tmp_path, eval_sh, capsys, content):
    (tmp_path / "config.json").write_text(content)
    assert eval_sh(tmp_path, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "config.json" in error
    assert len(error.splitlines()) == 1


def test_names_of_the_authors_are_tasks_and_eval_sh_says_which(checkpoint, tmp_path, eval_sh, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(program, "run_lm_eval", lambda name, run, folder, args: asked.append(run["tasks"]))
    arguments = ["--tasks", "dart,gpqa_diamond,agieval,squadv2,truthfulqa", "--output_dir", tmp_path, "--device", "cpu"]
    eval_sh(checkpoint, *arguments, "--chat_template", "truthfulqa")  # ends where it finds no results
    assert asked == ["drllm_dart,gpqa_diamond_zeroshot,agieval,squadv2,truthfulqa_mc1"] * 2
    printed = capsys.readouterr().out
    assert "--tasks truthfulqa: truthfulqa_mc1 (in lm-eval a tag of three tasks)" in printed
    assert "--tasks dart: drllm_dart" in printed
    assert "truthfulqa_mc1: with chat template" in printed


@pytest.mark.parametrize("allowed", [False, True])
def test_generated_code_runs_only_when_asked_for(checkpoint, tmp_path, eval_sh, monkeypatch, allowed):
    launched = []

    def launch(command, log):
        launched.append(("--confirm_run_unsafe_code" in command, os.environ.get("HF_ALLOW_CODE_EVAL")))
        log.write_text("error: stopped here\n")
        return 1

    monkeypatch.setattr(lm_eval_process, "launch", launch)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")  # put back afterwards
    arguments = [checkpoint, "--tasks", "humaneval", "--output_dir", tmp_path]
    assert eval_sh(*arguments, *(["--unsafe_code"] if allowed else [])) == 2
    assert launched == [(True, "1") if allowed else (False, "0")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{nowhere}"], "is not a checkpoint: it has no config.json"),
        (["{base}"], "is a plain llama checkpoint without routers"),
        (["{checkpoint}", "--data_dir", "{nowhere}"], "nowhere does not exist"),
        (["{checkpoint}", "--labels", "{nowhere}"], "--labels"),
        (["{checkpoint}", "--data_dir", "{base}", "--device", "cpu"], "has no arc_easy_test.jsonl"),
        (
            ["{checkpoint}", "--data_dir", "{data}", "--path", "0110", "--device", "cpu"],
            "path=0110: must have one digit",
        ),
    ],
)
def test_bad_input_is_one_sentence(base, checkpoint, data, tmp_path, launches, eval_sh, capfd, arguments, message):
    places = {"base": base, "checkpoint": checkpoint, "data": data, "nowhere": tmp_path / "nowhere"}
    arguments = [argument.format(**places) for argument in arguments]
    # in this process the errors of a run go to stderr rather than to its log
    assert eval_sh(*arguments, "--output_dir", tmp_path / "out", "--tasks", "drllm_arc_easy") == 2
    assert message in capfd.readouterr().err


def test_the_script_finds_its_python_and_reports_errors(tmp_path):
    script = [str(ROOT / "eval.sh"), str(tmp_path / "nowhere")]
    done = subprocess.run(
        script, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHON": sys.executable}
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    done = subprocess.run(script, capture_output=True, text=True, env=os.environ | {"PYTHON": "no-such-python"})
    assert done.returncode == 2
    assert done.stderr == "error: no no-such-python here; set PYTHON to your interpreter\n"


@pytest.mark.slow
def test_the_script_from_any_folder(checkpoint, data, tmp_path):
    command = f"{ROOT / 'eval.sh'} {checkpoint} --data_dir {data} --output_dir out --tasks drllm_arc_easy --device cpu"
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command.split(), capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "| base " in done.stdout
    assert (tmp_path / "out" / "table.tex").is_file()
