"""Two processes that share a sharded model, with gloo on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "fsdp2", "ddp"])
def test_processes_whose_prompts_follow_different_paths_differ_in_nothing(kind, decisive, tmp_path):
    decisive().save_pretrained(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program = Path(__file__).with_name("two_ranks.py")
    run = subprocess.run([*launcher, program, tmp_path, kind], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    assert run.stdout.count("done") == 2
