"""What needs no weights: the tests of the LLM say how to get them, and only `make test-llm` runs them."""

import os
import shutil
import subprocess

import pytest

from tests.llm.steps import DEFAULT_MODEL, GET_MODEL, ROOT, model_folder


def test_without_weights_the_tests_fail_with_the_command_that_gets_them(tmp_path, monkeypatch):
    with pytest.raises(pytest.fail.Exception) as failure:
        model_folder(tmp_path / "nothing")
    assert (
        str(failure.value) == f"no checkpoint in {tmp_path / 'nothing'}: run `{GET_MODEL}`, or pass --llm_model FOLDER"
    )
    monkeypatch.setattr("tests.llm.steps.DEFAULT_MODEL", tmp_path / "default")
    with pytest.raises(pytest.fail.Exception, match="default: run"):
        model_folder(None)
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "config.json").write_text("{}")
    assert model_folder(None) == tmp_path / "default"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_that_command_makes_the_folder_and_the_tests_run_after_it():
    def recipe(target: str) -> str:
        # `make test` hands its own flags down, and a make below another one also prints the directories it enters.
        variables = {
            name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
        }
        command = ["make", "--dry-run", "--always-make", target]
        return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True).stdout

    made = recipe(GET_MODEL.removeprefix("make "))
    assert "drllm.gguf_checkpoint" in made
    assert f"--output_dir {DEFAULT_MODEL.relative_to(ROOT)}" in made
    tested = recipe("test-llm").splitlines()
    assert "drllm.gguf_checkpoint" in "".join(tested[:-1])
    assert "-m pytest -m llm" in tested[-1]


def test_other_runs_leave_them_out(pytestconfig):
    assert "not llm" in " ".join(pytestconfig.getini("addopts"))
    assert any(marker.startswith("llm:") for marker in pytestconfig.getini("markers"))
