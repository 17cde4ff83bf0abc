"""One command from questions to a routed checkpoint."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from drllm.checkpoints import join_routers, load_routed_checkpoint, load_tokenizer
from drllm.miniature import MINIATURE_DATA, ROOT
from drllm.questions.prompts import render_prompt
from drllm.questions.sets import load_questions
from experiments.group_paths import main, parse_arguments


def test_one_command_from_questions_to_a_checkpoint(tmp_path):
    command = f"--data_dir {MINIATURE_DATA} --dataset arc_easy,dart-5 --train_questions 6 --groups 2 --most_skips 1"
    main([*command.split(), "--price", "2", "--output_dir", str(tmp_path)])
    model, tokenizer = load_routed_checkpoint(tmp_path, device="cpu"), load_tokenizer(tmp_path)
    assert model.config.trained_num_windows == 8
    assert json.loads((tmp_path / "labels_manifest.json").read_text())["chat_template"] is False
    text = render_prompt(load_questions("arc_easy", "train", MINIATURE_DATA, 1)[0])
    with torch.no_grad():
        paths = model(**tokenizer(text, return_tensors="pt")).paths
    assert paths.eq(0).sum() == 1, "a price above every reward skips what it can"
    assert join_routers(tmp_path / "routers").config.base_model_fingerprint == model.config.base_model_fingerprint


@pytest.mark.slow
def test_two_processes_make_the_same_checkpoint_and_a_stopped_run_resumes(tmp_path):
    common = f"-m experiments.group_paths --data_dir {MINIATURE_DATA} --dataset arc_easy,dart-5 --train_questions 300"
    command = [*common.split(), "--groups", "4", "--most_skips", "1", "--price", "0.01", "--output_dir"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    alone = subprocess.Popen([sys.executable, *command, tmp_path / "alone"], cwd=ROOT, env=environment)
    while len(list(tmp_path.glob("alone-measured/*/*.safetensors"))) < 3:
        assert alone.poll() is None
        time.sleep(0.05)
    alone.kill()
    alone.wait()
    kept = {part: part.stat().st_mtime_ns for part in tmp_path.glob("alone-measured/*/*.safetensors")}
    subprocess.run([sys.executable, *command, tmp_path / "alone"], cwd=ROOT, env=environment, check=True)
    assert all(part.stat().st_mtime_ns == written for part, written in kept.items())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631"]
    subprocess.run([*torchrun, *command, tmp_path / "two"], cwd=ROOT, env=environment, check=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "two"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["--most_skips", "-1"], "--most_skips is -1; it must be at least 0"),
        (["--groups", "0"], "--groups is 0; it must be at least 1"),
        (["--train_questions", "0"], "--train_questions 0: expected numbers of at least 1"),
        (["--train_questions", "dart-1=5,none=5"], "--train_questions dart-1=5,none=5: expected"),
        (["--keep_edits", "0.9"], "--keep_edits is a share of the validation questions; give --validation_questions"),
        (["--keep_edits", "2"], "--keep_edits is 2.0; it must be between 0 and 1"),
        (["--validation_questions", "many"], "--validation_questions many: expected 0, a number"),
        (["--price", "nan"], "--price is nan; it must be a number"),
        (["--seed", "-1"], "--seed is -1; it must be between 0 and 4294967295"),
        (["--seed", "4294967296"], "--seed is 4294967296; it must be between 0 and 4294967295"),
        (["--dtype", "int7"], "unknown dtype 'int7'"),
        (["--dataset", "arc,none_such"], "none_such"),
    ],
)
def test_bad_arguments_end_before_the_model_is_loaded(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.group_paths.load_base", lambda *given: pytest.fail("the model was loaded"))
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_below_a_file_ends_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.group_paths.load_base", lambda *given: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("content")
    for place in ("file", "file/below"):
        assert main(["--output_dir", str(tmp_path / place)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --output_dir {tmp_path / place} is ")
        assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "content"


def test_the_bundled_model_has_its_own_questions(tmp_path):
    def data_dir(*arguments):
        return parse_arguments([*arguments, "--output_dir", str(tmp_path / "out")]).data_dir

    assert data_dir() == MINIATURE_DATA
    assert data_dir("--model", str(tmp_path)) is None
    assert data_dir("--data_dir", str(tmp_path)) == tmp_path
