"""The three programs under an interpreter without the packages of requirements.txt."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("program", ["data_generation.py", "train.py", "eval.sh"])
def test_an_interpreter_without_torch_is_named_with_what_to_do(program, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: without installed packages
    bare.chmod(0o755)
    command = ["./eval.sh", "checkpoint"] if program == "eval.sh" else [str(bare), program]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHON": str(bare), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for words in ("has no torch", "requirements.txt", "source .venv/bin/activate", "PYTHON=.venv/bin/python"):
        assert words in done.stderr
