"""Fingerprints, dtype names and the way scripts end."""

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drllm import provenance
from drllm.errors import UserError, main_guard


def tiny(seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_fingerprint_is_the_same_in_every_dtype_and_with_routers(tied):
    stored = tiny(tied=tied).to(torch.bfloat16)
    expected = provenance.fingerprint(stored)
    assert provenance.fingerprint(copy.deepcopy(stored).float()) == expected
    assert provenance.fingerprint(copy.deepcopy(stored).half()) == expected
    with_routers = copy.deepcopy(stored)
    with_routers.model.routers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    assert provenance.fingerprint(with_routers) == expected


def test_fingerprint_tells_fp32_weights_from_their_neighbours():
    model = tiny()
    expected = provenance.fingerprint(model)
    assert provenance.fingerprint(copy.deepcopy(model).to(torch.bfloat16)) == expected
    assert provenance.fingerprint(tiny(seed=1)) != expected
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1.0  # one sampled value of one block
    assert provenance.fingerprint(model) != expected


def test_dtype_names():
    assert provenance.parse_dtype("bf16") is torch.bfloat16
    assert provenance.parse_dtype("torch.float32") is torch.float32
    assert provenance.dtype_name("fp16") == "float16"
    assert provenance.dtype_name(torch.bfloat16) == "bfloat16"
    with pytest.raises(UserError, match=r"unknown dtype 'int3'.*bfloat16"):
        provenance.parse_dtype("int3")


def test_versions_and_commit():
    assert torch.__version__.startswith(provenance.versions()["torch"].split("+")[0])
    assert provenance.commit() is None or len(provenance.commit()) >= 40


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (UserError("x.jsonl:3: cut off; delete the line"), 2, "error: x.jsonl:3: cut off; delete the line\n"),
        (KeyboardInterrupt(), 130, "interrupted: stopped by Ctrl-C\n"),
        (KeyboardInterrupt("3 questions are on disk"), 130, "interrupted: 3 questions are on disk\n"),
    ],
)
def test_main_guard_says_one_sentence(raised, status, message, capsys):
    @main_guard
    def main():
        raise raised

    assert main() == status
    assert capsys.readouterr().err == message


def test_main_guard_lets_results_and_defects_through():
    assert main_guard(lambda: None)() == 0
    assert main_guard(lambda: 3)() == 3
    with pytest.raises(ZeroDivisionError):
        main_guard(lambda: 1 // 0)()


def test_a_result_says_how_to_reproduce_it(tmp_path):
    path = tmp_path / "new" / "result.json"
    command = provenance.command_line("python -m x", ["--data", f"{provenance.ROOT}/miniature/data", "two words"])
    assert command == "python -m x --data miniature/data 'two words'"
    record = provenance.write_result(path, {"accuracy": 0.5}, command=command, seed=[0, 1], seconds=1.234)
    assert json.loads(path.read_text()) == record
    assert record["machine"].keys() == {"cpu_count", "threads", "gpus"}
    assert list(record) == ["command", "seed", "accuracy", "seconds", "machine", "versions", "commit"]
    assert (record["seed"], record["seconds"], record["accuracy"]) == ([0, 1], 1.23, 0.5)
    assert not path.with_suffix(".md").exists()
    provenance.write_result(path, {}, command=command, seed=0, seconds=0, table="| a |")
    assert path.with_suffix(".md").read_text() == f"| a |\n\nCommand:\n\n    {command}\n"
    with pytest.raises(ValueError, match="already has commit, seed"):
        provenance.write_result(path, {"seed": 1, "commit": ""}, command="x", seed=0, seconds=0)
    with pytest.raises(UserError, match=r"result\.json is a file"):
        provenance.write_result(path / "below.json", {}, command="x", seed=0, seconds=0)
