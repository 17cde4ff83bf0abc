"""Exported paths of the LLM in llama.cpp: greedy tokens are those of transformers in float32."""

import json
import shutil

import pytest

from benchmarks.exported_paths import CONVERTER, main
from drllm.provenance import ROOT
from tests.eval_toys import make_tasks
from tests.llm.steps import model_folder
from tests.search_toys import make_data

pytestmark = pytest.mark.serving


def test_tokens_are_those_of_transformers(pytestconfig, tmp_path):
    model = model_folder(pytestconfig.getoption("llm_model"))
    data = make_tasks(make_data(tmp_path / "data", 4), 4)
    paths = {"": 30, "skip 0; repeat 17": 30, "skip 19, skip 29": 28, "skip 10-13": 26, "repeat 4-5": 32}
    arguments = (
        f"--model {model} --data_dir {data} --converter {ROOT / CONVERTER} --prompts 4 --new_tokens 12 --pairs 1"
    )
    arguments += f" --work_dir {tmp_path / 'work'} --output {tmp_path / 'result.json'}"
    named = [part for path in paths if path for part in ("--path", path)]
    assert main([*arguments.split(), *named]) == 0
    shutil.rmtree(tmp_path / "work")  # three gigabytes
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert {row["path"]: (row["blocks"], row["prompts_with_equal_tokens"]) for row in rows} == {
        path: (blocks, 4) for path, blocks in paths.items()
    }
