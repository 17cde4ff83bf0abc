"""data_generation.py as a person runs it: end to end, killed, interrupted, on a full disk, with bad input."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import data_generation
from drllm import labels
from drllm.questions.grading import GRADER_VERSION
from drllm.questions.per_set import numbers_per_set
from drllm.questions.prompts import wants_chat_template
from tests import search_toys

ROOT = Path(data_generation.__file__).parent
SMALL_SEARCH = ["--dataset", "arc,dart-1", "--num_simulations", "8", "--samples", "12", "--batch_size", "16"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory, stock_model):
    """Arguments that choose the toy model and its data."""
    folder = tmp_path_factory.mktemp("toy")
    search_toys.make_model(folder / "model", stock_model)
    search_toys.make_data(folder / "data", 40)
    return ["--model", str(folder / "model"), "--data_dir", str(folder / "data")]


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert data_generation.main([*toy, *SMALL_SEARCH, "--output_dir", str(folder)]) == 0
    return folder


def start(arguments: list[str], num_processes: int = 1) -> subprocess.Popen:
    """The script in a session of its own, so that all its processes can be killed at one instant."""
    command = [sys.executable, str(ROOT / "data_generation.py"), *arguments]
    if num_processes > 1:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = str(probe.getsockname()[1])
        # Without a GPU `accelerate launch` starts one process, whatever it is told; on GPUs it starts them like this.
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
        command = [sys.executable, *launch, "--master_port", port, *command[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        command,
        start_new_session=True,
        env=environment,
        cwd=ROOT,
        # Tests that run in the background of a shell inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **pipes,
    )


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):  # the run ended before
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def lines_in(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (folder / "progress").glob("*.jsonl"))


def wait_for_lines(process: subprocess.Popen, folder: Path, count: int) -> None:
    """Waits until `count` questions are finished, or the script is."""
    while lines_in(folder) < count and process.poll() is None:
        time.sleep(0.002)


def searched_ids(folder: Path) -> list[str]:
    """The ids of all searches; a question may have been visited without a search before."""
    lines = [line for path in (folder / "progress").glob("*.jsonl") for line in path.read_bytes().splitlines()]
    return [row["question_id"] for row in map(json.loads, lines) if row["simulations"]]


def labels_of(folder: Path) -> bytes:
    return (folder / "labels.jsonl").read_bytes()


def test_labels_manifest_and_table(toy, undisturbed, tmp_path, capsys):
    assert data_generation.main([*toy, *SMALL_SEARCH, "--output_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert " ".join(out[0].split()) == (
        "set original sampled visited inferences wrong-to-right base accuracy layers saved"
    )
    assert [line.split()[0] for line in out[1:5]] == ["arc_easy", "arc_challenge", "dart-1", "total"]
    assert out[-1] == f"labels: {tmp_path / 'labels.jsonl'}"
    found = labels.read_labels(tmp_path)
    assert labels_of(tmp_path) == labels_of(undisturbed)
    assert {label.kind for label in found.labels} == {"wrong_to_right", "shorter"}
    for label in found.labels:
        assert label.inferences <= label.simulations + 1 <= 9
        if label.kind == "shorter":
            assert label.base_correct
            assert sum(label.path) < 6
        else:
            assert not label.base_correct
        assert label.path in label.good_paths
    assert out[5].startswith("beyond the quotas: ")
    assert "wrong-to-right" in out[-2] or len(out) == 7
    manifest = found.manifest
    assert (manifest.num_layers, manifest.dtype, manifest.chat_template, manifest.seed) == (6, "float32", False, 0)
    assert manifest.arguments["num_simulations"] == 8
    assert manifest.grader_version == GRADER_VERSION
    assert len(manifest.model_fingerprint) == 16
    assert sum(row["sampled"] for row in manifest.results["table2"]) == len(found.labels)


def test_response_format_is_recorded_and_used(toy, tmp_path):
    options = ["--dataset", "arc_easy", "dart-1", "--max_new_tokens", "dart=3", "--inject_boxed", "--strict_letters"]
    small = ["--num_simulations", "2", "--limit", "4", "--output_dir", str(tmp_path)]
    assert data_generation.main([*toy, *options, *small]) == 0
    recorded = json.loads((tmp_path / "manifest.json").read_text())["arguments"]
    assert recorded["max_new_tokens"] == {"arc_easy": 2, "dart-1": 3}
    assert (recorded["inject_boxed"], recorded["strict_letters"]) == (True, True)
    rows = [json.loads(line) for line in (tmp_path / "progress" / "00000.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["prompt"].endswith(r"Answer: \boxed{" if row["set"] == "dart-1" else "Answer:")
        assert len(row["base_response"].split()) <= recorded["max_new_tokens"][row["set"]]
    assert data_generation.main([*toy, *options[:3], *small]) == 2


@pytest.mark.parametrize("changes", [["--batch_size", "3"], ["--batch_size", "64", "--concurrency", "5"]])
def test_labels_do_not_depend_on_the_batch(toy, undisturbed, tmp_path, changes):
    assert data_generation.main([*toy, *SMALL_SEARCH, *changes, "--output_dir", str(tmp_path)]) == 0
    assert labels_of(tmp_path) == labels_of(undisturbed)


def interrupted_after_a_kill(toy, folder: Path) -> tuple[list[str], int, str]:
    """A run killed, continued and interrupted: (its arguments, exit status, stderr)."""
    # One question and one rollout at a time, so that there is time to stop the run.
    slowly = ["--concurrency", "1", "--batch_size", "1"]
    arguments = [*toy, *SMALL_SEARCH, *slowly, "--output_dir", str(folder)]
    process = start(arguments)
    wait_for_lines(process, folder, 2)
    kill(process)
    killed_at = lines_in(folder)
    assert killed_at >= 2
    with (folder / "progress" / "00000.jsonl").open("ab") as file:
        file.write(b'{"question": "half a li')  # what a kill in the middle of a write leaves
    process = start(arguments)
    wait_for_lines(process, folder, killed_at + 1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert lines_in(folder) >= killed_at
    return arguments, process.returncode, said


def test_killed_and_interrupted_runs_continue(toy, undisturbed, tmp_path):
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        arguments, status, said = interrupted_after_a_kill(toy, folder)
        if status != 0:
            break  # else, on a busy machine, it ended before the signal came
    assert status == 130
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("interrupted: at least ")
    assert last.endswith(f"finished questions are kept in {folder}; run the same command to resume")
    assert data_generation.main(arguments) == 0
    assert labels_of(folder) == labels_of(undisturbed)
    assert len(searched_ids(folder)) == len(set(searched_ids(folder)))


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_run_stopped_by_a_signal_is_resumed(toy, undisturbed, tmp_path, sent):
    arguments = [*toy, *SMALL_SEARCH, "--concurrency", "4", "--batch_size", "4", "--output_dir", str(tmp_path)]
    for wanted in (1, 3, 6):
        process = start(arguments)
        wait_for_lines(process, tmp_path, wanted)
        process.send_signal(getattr(signal, sent))
        _, said = process.communicate()
        assert "Traceback" not in said
        assert process.returncode in (130, -getattr(signal, sent), 0)
    assert data_generation.main(arguments) == 0
    assert labels_of(tmp_path) == labels_of(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_twenty_random_instants_with_changing_processes(toy, undisturbed, tmp_path, seed):
    choose = random.Random(seed)
    arguments = [*toy, *SMALL_SEARCH, "--concurrency", "4", "--batch_size", "4", "--output_dir", str(tmp_path)]
    finished = 0
    for kills in range(20):
        process = start(arguments, num_processes=choose.choice([1, 1, 2, 3]))
        if kills % 4 == 3:
            time.sleep(choose.uniform(0, 12))  # at any time: also while starting
        else:
            wait_for_lines(process, tmp_path, finished + choose.randint(1, 5))
            time.sleep(choose.uniform(0, 0.1))
        kill(process)
        assert lines_in(tmp_path) >= finished
        finished = lines_in(tmp_path)
    process = start(arguments, num_processes=2)
    out, said = process.communicate()
    assert process.returncode == 0, said
    assert f"labels: {tmp_path / 'labels.jsonl'}" in out
    assert labels_of(tmp_path) == labels_of(undisturbed)


@pytest.mark.slow
def test_several_processes_find_the_same_labels(toy, undisturbed, tmp_path):
    process = start([*toy, *SMALL_SEARCH, "--output_dir", str(tmp_path)], num_processes=3)
    out, said = process.communicate()
    assert process.returncode == 0, said
    assert out.count("\nlabels: ") == 1  # printed by one process
    assert labels_of(tmp_path) == labels_of(undisturbed)
    shards = sorted((tmp_path / "progress").glob("*.jsonl"))
    assert [shard.name for shard in shards] == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
    assert len(searched_ids(tmp_path)) == len(set(searched_ids(tmp_path)))
    # One process continues where three left off: there is nothing to search, and the file stays the same.
    assert data_generation.main([*toy, *SMALL_SEARCH, "--output_dir", str(tmp_path)]) == 0
    assert labels_of(tmp_path) == labels_of(undisturbed)


def test_a_full_disk_is_one_sentence_and_loses_nothing(toy, undisturbed, tmp_path, capsys):
    arguments = [*toy, *SMALL_SEARCH, "--output_dir", str(tmp_path)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, before[1]))  # no file may grow beyond
    try:
        assert data_generation.main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: no space left to write {tmp_path / 'progress' / '00000.jsonl'}")
    assert last.endswith("finished questions are kept: free some space and run the same command to resume")
    content = (tmp_path / "progress" / "00000.jsonl").read_bytes()
    assert content.endswith(b"\n")
    assert content.count(b"\n") > 3
    assert data_generation.main(arguments) == 0
    assert labels_of(tmp_path) == labels_of(undisturbed)


def test_a_run_with_other_arguments_is_refused_and_changes_nothing(toy, undisturbed, capsys):
    before = labels_of(undisturbed)
    for changes, difference in (
        (["--c", "2.5"], "arguments.c was 1.8 and is now 2.5"),
        (["--seed", "1"], "questions.arc_easy was "),
        (["--dtype", "bf16"], 'dtype was "float32" and is now "bfloat16"'),
        (["--samples", "13"], "arguments.samples.arc_challenge was 12 and is now 13"),
        (["--limit", "5"], "arguments.limit was null and is now 5"),
    ):
        assert data_generation.main([*toy, *SMALL_SEARCH, *changes, "--output_dir", str(undisturbed)]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith(f"error: {undisturbed} holds labels of another run: ")
        assert difference in last or changes[0] == "--seed"
        assert "choose another --output_dir" in last
    assert labels_of(undisturbed) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model", "/no/such/model"], "cannot load the model /no/such/model: the folder does not exist"),
        (["--dataset", "arc,mmlu"], "unknown question set 'mmlu'; there are the groups arc, dart"),
        (["--data_dir", "/no/such/folder"], "data folder /no/such/folder does not exist"),
        (["--budget", "0.5"], "--budget is 0.5; it must be at least 1"),
        (["--dtype", "int7"], "unknown dtype 'int7': choose one of float32"),
        (["--samples", "many"], "--samples many: expected paper, a number, or"),
        (["--samples", "squadv2=3"], "--samples squadv2=3: expected numbers of at least 1 for sets of --dataset: arc"),
        (["--wrong_to_right_share", "30"], "--wrong_to_right_share is 30.0; it must be between 0 and 1"),
        (["--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["--concurrency", "-1"], "--concurrency is -1; it must be at least 1"),
        (["--num_simulations", "0"], "--num_simulations is 0; it must be at least 1"),
        (["--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--seed", "-1"], "--seed is -1; it must be between 0 and 4294967295"),
        (["--seed", "4294967296"], "--seed is 4294967296; it must be between 0 and 4294967295"),
        (["--c", "nan"], "--c is nan; it must be"),
        (["--c", "inf"], "exploration is inf; it must be a number of at least 0"),
        (["--lambda", "nan"], "--lambda is nan; it must be at least 0"),
        (["--budget", "inf"], "budget is inf; it must be"),
        (["--p_rand", "1.5"], "--p_rand is 1.5; it must be between 0 and 1"),
        (["--samples", "dart=0"], "--samples dart=0: expected numbers of at least 1"),
        (["--samples", "arc=3=4"], "--samples arc=3=4: expected paper, a number, or name=number"),
        (["--samples", "-5"], "--samples -5: expected numbers of at least 1"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0: expected numbers of at least 1"),
        (["--max_new_tokens", "dart:3"], "--max_new_tokens dart:3: expected default, a number, or name=number"),
        (["--max_new_tokens", "dart-5=20"], "--max_new_tokens dart-5=20: expected numbers of at least 1 for sets of"),
        (["--inject_boxed", "--chat_template", "on"], "--inject_boxed is for base models"),
        (["--output_dir", __file__], f"--output_dir {__file__} is a file"),
        (["--output_dir", f"{__file__}/below/it"], f"--output_dir {__file__}/below/it is below the file {__file__}"),
        (["--chat_template", "on"], "--chat_template on: the tokenizer of"),
    ],
)
def test_bad_arguments_are_one_sentence(toy, tmp_path, capsys, changes, message):
    assert data_generation.main([*toy, *SMALL_SEARCH, "--output_dir", str(tmp_path / "out"), *changes]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert said[0].startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_an_unsupported_family_and_empty_data_are_one_sentence(toy, tmp_path, capsys):
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(toy[1], model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    arguments = [*SMALL_SEARCH, "--output_dir", str(tmp_path / "out")]
    assert data_generation.main(["--model", str(model), *toy[2:], *arguments]) == 2
    assert "model_type 'gpt2' is not supported; supported are llama" in capsys.readouterr().err
    data.mkdir()
    for stem in ("arc_easy", "arc_challenge", "dart_math"):
        (data / f"{stem}_train.jsonl").touch()
    assert data_generation.main([*toy[:2], "--data_dir", str(data), *arguments]) == 2
    assert "has no question of the set 'arc_easy'" in capsys.readouterr().err
    (data / "arc_easy_train.jsonl").write_text('{"question": "a')
    assert data_generation.main([*toy[:2], "--data_dir", str(data), *arguments]) == 2
    assert "arc_easy_train.jsonl:1: not valid JSON" in capsys.readouterr().err


def test_questions_longer_than_the_context_are_left_out_and_said(toy, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(toy[3], data)
    row = json.loads((data / "arc_easy_train.jsonl").read_text().splitlines()[0])
    long = json.dumps(row | {"question": "w1 " * 300}) + "\n"
    (data / "arc_easy_train.jsonl").write_text(long + (data / "arc_easy_train.jsonl").read_text())
    arguments = [*toy[:2], "--data_dir", str(data), "--dataset", "arc_easy", "--num_simulations", "2"]
    assert data_generation.main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "left out 1 questions that exceed the model's context of 256 tokens" in captured.err
    assert captured.out.splitlines()[1].split()[:4:3] == ["arc_easy", "40"]  # visited all others


CHATML = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<e>\n{% endfor %}"


@pytest.mark.parametrize(
    ("setting", "name", "template", "stops", "expected", "why"),
    [
        ("auto", "models/local", CHATML, "<e>", True, "stops at the end of a turn, <e>"),
        ("auto", "models/local", CHATML, ["<end>", "<e>"], True, "stops at the end of a turn"),
        ("auto", "Qwen/Qwen2.5-3B", CHATML, "<end>", False, "like a base model"),  # a base model that has a template
        ("auto", "org/local", CHATML, None, False, "like a base model"),
        ("auto", "org/local", "{{ raise_exception('no') }}", "<e>", False, "like a base model"),
        ("auto", "org/model-INSTRUCT", CHATML, "<end>", True, "name says instruct"),
        ("auto", "org/model-instruct", None, "<e>", False, "has none"),
        ("on", "Qwen/Qwen2.5-3B", CHATML, "<end>", True, "--chat_template on"),
        ("off", "org/model-instruct", CHATML, "<e>", False, "--chat_template off"),
    ],
)
def test_auto_gives_the_chat_template_to_models_that_stop_at_the_end_of_a_turn(
    setting, name, template, stops, expected, why
):
    words = {word: place for place, word in enumerate(["<end>", "<s>", "<e>", "question", "answer"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "answer")), eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "<e>"]})
    tokenizer.chat_template = template
    ids = stops and tokenizer.convert_tokens_to_ids(stops)
    wanted, reason = wants_chat_template(setting, name, tokenizer, ids)
    assert wanted is expected
    assert why in reason


def test_numbers_per_set():
    sets = ["arc_easy", "dart-1", "dart-5"]
    assert numbers_per_set("--samples", "paper", sets, "paper") == {}
    assert numbers_per_set("--samples", "7", sets, "paper") == dict.fromkeys(sets, 7)
    assert numbers_per_set("--samples", "dart-5=3, arc_easy=4", sets, "paper") == {"dart-5": 3, "arc_easy": 4}
    assert numbers_per_set("--samples", "dart-5=3,dart=4", sets, "paper") == {"dart-1": 4, "dart-5": 3}


def test_the_paper_s_values_are_the_defaults():
    args = data_generation.parse_arguments([])
    assert (args.num_simulations, args.budget, args.c, args.length_penalty, args.p_rand) == (50, 2.0, 1.8, 3.0, 0.1)
    assert (args.dataset, args.wrong_to_right_share, args.output_dir) == ("arc,dart", 0.3, "data/")


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_questions(toy, tmp_path):
    code = (
        "import resource, sys, data_generation; status = data_generation.main(sys.argv[1:]); "
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    peaks = {}
    for count in (50, 1000):
        data = search_toys.make_data(tmp_path / f"data{count}", count)
        search = ["--dataset", "arc", "--num_simulations", "4", "--samples", "5000", "--batch_size", "16"]
        arguments = ["--model", toy[1], "--data_dir", str(data), *search, "--output_dir", str(tmp_path / f"{count}")]
        command = [sys.executable, "-c", code, *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        peaks[count] = int(done.stdout.split()[-1]) / 1024
    # Twenty times the questions; what is known of each, and its text, are a few hundred bytes.
    assert peaks[1000] - peaks[50] < 25, peaks


LIKELIHOOD_SEARCH = ["--reward", "likelihood", "--dataset", "arc", "--num_simulations", "8", "--samples", "12"]


def test_a_log_likelihood_reward_is_recorded_and_gives_the_same_labels_at_any_batch_size(toy, tmp_path, capsys):
    for name, batch_size in (("a", "16"), ("b", "3")):
        arguments = [*toy, *LIKELIHOOD_SEARCH, "--batch_size", batch_size, "--output_dir", str(tmp_path / name)]
        assert data_generation.main(arguments) == 0
    assert (tmp_path / "a" / "labels.jsonl").read_bytes() == (tmp_path / "b" / "labels.jsonl").read_bytes()
    found = labels.read_labels(tmp_path / "a")
    assert found.labels
    assert found.manifest.reward == "likelihood"
    assert found.manifest.chat_template is False
    for label in found.labels:
        assert label.prompt == f"Question: {label.question}\nAnswer:"
        assert label.path_response == label.answer  # the label of the chosen option
        assert (label.base_response == label.answer) == label.base_correct
    arguments = [*toy, *LIKELIHOOD_SEARCH, "--reward", "likelihood_norm", "--output_dir", str(tmp_path / "a")]
    assert data_generation.main(arguments) == 2
    assert 'reward was "likelihood" and is now "likelihood_norm"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--dataset", "arc,dart-1"], "dart-1 is not multiple choice, so --reward likelihood cannot judge it"),
        (["--inject_boxed"], "--inject_boxed shapes responses, but --reward likelihood generates none"),
        (["--strict_letters"], "--strict_letters shapes responses"),
        (["--chat_template", "on"], "uses lm-eval's prompts, which have no chat template"),
    ],
)
def test_what_a_log_likelihood_reward_cannot_follow_is_refused(toy, tmp_path, capsys, extra, sentence):
    arguments = [*toy, *LIKELIHOOD_SEARCH, *extra, "--output_dir", str(tmp_path)]
    assert data_generation.main(arguments) == 2
    assert sentence in capsys.readouterr().err
