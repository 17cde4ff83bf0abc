"""The benchmark of decoding beside the bandwidth measures what it says: counts, paths and bytes here, never times."""

import json

import pytest
import torch
from transformers import Qwen2Config

from benchmarks import decode
from train_models.paths import path_to_layer_indices


@pytest.fixture
def run(tmp_path):
    """(arguments) -> the written result at a tiny shape on a CPU."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **sizes).save_pretrained(tmp_path)

    def call(*arguments: str) -> dict:
        output = tmp_path / "result.json"
        command = ["--config", str(tmp_path), "--device", "cpu", "--dtype", "float32", "--output", str(output)]
        command += ["--new_tokens", "4", "--prompt_tokens", "9", "--rounds", "1", "--prompts", "5", "--skip", "2"]
        assert not decode.main([*command, *arguments])
        return json.loads(output.read_text())

    return call


def test_each_mode_decodes_each_path(run):
    result = run("--batch_sizes", "1,3", "--modes", "stock,eager,graphs")
    kinds = [(row["batch_size"], row["mode"], row["rows"]) for row in result["rows"]]
    routed = [(mode, rows) for mode in ("eager", "graphs") for rows in ("default", "shared", "mixed")]
    assert kinds == [
        (batch_size, *kind)
        for batch_size in (1, 3)
        for kind in [("stock", "default"), *routed]
        if batch_size > 1 or kind[1] != "mixed"
    ]
    for row in result["rows"]:
        assert row["blocks_run"] == 4 if row["rows"] == "shared" else row["blocks_run"] <= 6
        assert row.get("same_tokens", 1) == 1, "float32 tokens are those of eager decoding"
        assert ("decode_saved_over_blocks" in row) == (row["rows"] != "default")
        assert row["over_bound"] == pytest.approx(row["ms_per_token"] / row["bound_ms"])
    assert result["many_paths"]["prompts"] == 5
    assert result["many_paths"]["captures_after_the_first"] == 0
    assert result["memory"]["buffer_bytes"]["graphs"] == 4 * 6 * (1 + 3) * 256 * 2 * 8 * 4


def test_the_bound_counts_what_a_step_reads(tmp_path):
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config.save_pretrained(tmp_path)
    arguments = ["--config", str(tmp_path), "--device", "cpu", "--dtype", "bfloat16"]
    _, model = decode.load_models(decode.parse_arguments(arguments))
    total = sum(part.nbytes for name, part in model.named_parameters() if "routers" not in name)
    block = sum(part.nbytes for part in model.model.layers[0].parameters())
    assert decode.weights_read(model, [(1,) * 6]) == total, "a tied embedding is read once, as the head"
    assert decode.weights_read(model, [(0, 1, 1, 1, 1, 1), (0, 0, 1, 1, 1, 2)]) == total
    assert decode.weights_read(model, [(0, 1, 1, 1, 1, 1), (0, 0, 1, 1, 1, 1)]) == total - block


def test_tokens_are_those_of_generate(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **sizes).save_pretrained(tmp_path)
    arguments = ["--config", str(tmp_path), "--device", "cpu", "--dtype", "float32", "--new_tokens", "5"]
    bench = decode.Bench(decode.parse_arguments(arguments))
    input_ids, indices = bench.prompts(2), path_to_layer_indices((1, 0, 2, 1))
    generated = bench.routed.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        layer_indices=indices,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    for mode in ("eager", "graphs"):
        assert torch.equal(bench.run(mode, input_ids, [indices] * 2)[1], generated[:, input_ids.shape[1] :])
