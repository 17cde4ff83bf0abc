"""Adapters of PEFT on routed models, with PEFT in a folder beside the installed packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PEFT = "peft==0.21.2"


@pytest.mark.slow
def test_lora_records_the_routed_checkpoint_and_loads_with_its_routers(stock_checkpoint, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(tmp_path / "peft"), PEFT], check=True)
    command = [sys.executable, str(Path(__file__).with_name("adapter.py")), stock_checkpoint("llama"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "peft"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
