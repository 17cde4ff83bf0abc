"""benchmarks/evaluation.py in a process of its own, where nothing has imported the classes of a checkpoint yet."""

import json
import subprocess
import sys

import pytest

from drllm.miniature import ROOT
from tests import search_toys
from tests.eval_toys import make_routed, make_tasks


@pytest.mark.slow
def test_a_routed_checkpoint_is_measured(tmp_path, stock_model):
    routed = make_routed(search_toys.make_model(tmp_path / "model", stock_model), tmp_path / "routed")
    data = search_toys.make_data(tmp_path / "data", 16, seed=5)
    make_tasks(data, 12)
    command = [sys.executable, "benchmarks/evaluation.py", "--model", str(routed), "--data_dir", str(data)]
    command += ["--questions", "3", "--words", "2", "--batch_sizes", "1,2", "--pairs", "1", "--new_tokens", "3"]
    output = tmp_path / "result.json"
    ended = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    result = json.loads(output.read_text())
    for kind in ("one-token options", "many-token options"):
        assert result[kind]["largest_difference"] < 1e-3
        assert result[kind]["threads_1"].keys() == {"1", "2"}
    assert result["generation"]["threads_1"]["2"]["ratio"] > 0
