import re
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from drllm.checkpoints import load_routed_checkpoint, load_tokenizer
from experiments import inspect_prompt
from tests.eval_toys import make_base, make_routed

BLOCKS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory, stock_model):
    return make_base(tmp_path_factory.mktemp("base"), stock_model)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, base):
    return make_routed(base, tmp_path_factory.mktemp("routed"))


@pytest.fixture
def run(capsys):
    def inspect(*arguments) -> tuple[int, str, str]:
        status = inspect_prompt.main(["--device", "cpu", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return inspect


def test_decisions_probabilities_and_layers_are_those_of_the_model(checkpoint, run):
    status, out, _ = run(checkpoint, "w1 w2 w3 w4 w5 w6 w7 w8 w9", "--dtype", "float32", "--max_new_tokens", 4)
    assert status == 0
    model, tokenizer = load_routed_checkpoint(checkpoint, "float32", "cpu"), load_tokenizer(checkpoint)
    tokens = tokenizer("w1 w2 w3 w4 w5 w6 w7 w8 w9", return_tensors="pt").input_ids
    with torch.no_grad():
        output = model(tokens, output_router_logits=True)
    path = output.paths[0].tolist()
    probabilities = output.router_logits[0].softmax(-1)
    rows = [line.replace("*", " ").split() for line in out.splitlines()[1 : 1 + BLOCKS]]
    assert [row[1] for row in rows] == [inspect_prompt.ACTIONS[action] for action in path]
    assert {row[1] for row in rows} > {"execute"}, "the toy routers must decide something"
    for block, row in enumerate(rows):
        assert [float(cell) for cell in row[2:]] == pytest.approx(probabilities[block].tolist(), abs=6e-4)
    passes = int(re.search(r"routed:.* in (\d+) passes", out).group(1))
    assert f"{sum(path)} of {BLOCKS} layers per pass, {sum(path) * passes} in {passes} passes" in out
    assert re.search(rf"base:.* {BLOCKS} of {BLOCKS} layers per pass", out)
    assert f"{100 * (sum(path) / BLOCKS - 1):+.1f}%" in out


@pytest.mark.parametrize("begin", ["", "<s> "], ids=["no BOS in the template", "BOS in the template"])
def test_special_tokens_are_added_unless_the_template_brought_them(checkpoint, tmp_path, run, monkeypatch, begin):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    tokenizer.chat_template = begin + "w1 {{ messages[0]['content'] }} w2"
    tokenizer.save_pretrained(tmp_path)
    answer, calls = inspect_prompt.answer, []
    monkeypatch.setattr(inspect_prompt, "answer", lambda *given: calls.append((given[2], given[4])) or answer(*given))
    assert run(tmp_path, "w3", "--chat_template", "--max_new_tokens", 1)[0] == 0
    assert calls == [(begin + "w1 w3 w2", not begin)] * 2


def test_the_knob_reaches_the_routers(checkpoint, run):
    _, out, _ = run(checkpoint, "w1 w2 w3", "--routing_control", "0.5")
    assert "layers per pass against base: +0.0%" in out
    status, _, err = run(checkpoint, "w1 w2 w3", "--routing_control", "2")
    assert status == 2
    assert err == "error: --routing_control is 2.0; it must be between -1 and 1\n"


def test_bad_input_is_one_sentence(base, tmp_path, run):
    status, _, err = run(base, "w1")
    assert status == 2
    assert "is a plain llama checkpoint without routers" in err
    status, _, err = run(tmp_path / "nowhere", "w1")
    assert status == 2
    assert "the folder does not exist" in err
    status, _, err = run(base, "w1", "--max_new_tokens", "0")
    assert (status, err) == (2, "error: --max_new_tokens is 0; it must be at least 1\n")
    for device in ("nonsense", "cuda:99"):
        status, _, err = run(base, "w1", "--device", device)
        assert (status, err) == (
            2,
            f"error: --device {device} is not a device of this machine; e.g. cpu, cuda or cuda:0\n",
        )
