"""An exported path is a stock checkpoint that does what the path does here; bad input is one sentence."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_models import load_path_model
from drllm import stock_checkpoint
from drllm.export_path import main
from drllm.provenance import ROOT, fingerprint
from tests.conftest import STOCK
from train_models import retrofit

BLOCKS = {
    "skip 0": [1, 2, 3, 4, 5],
    "skip 5": [0, 1, 2, 3, 4],
    "repeat 2, repeat 3": [0, 1, 2, 2, 3, 3, 4, 5],
    "skip 0-1; repeat 5": [2, 3, 4, 5, 5],
    "": [0, 1, 2, 3, 4, 5],
}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}


def export(model: str, path: str, folder: Path, *more: str) -> Path:
    assert main([model, "--path", path, "--output_dir", str(folder), *more]) == 0
    return folder


def sharded(folder: str, copy: Path) -> str:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(copy, max_shard_size="20KB")
    assert len(list(copy.glob("*.safetensors"))) > 2
    return str(copy)


def assert_same(exported: Path, model: str, indices: list[int]) -> None:
    """Logits, and so log-likelihoods, and greedy tokens of the stock model are those of the path."""
    stock = AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    followed = load_path_model(model)
    prompt = torch.arange(1, 25).reshape(2, 12)
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    assert type(stock) is STOCK[stock.config.model_type][1]
    torch.testing.assert_close(stock(prompt).logits, followed(prompt, layer_indices=indices).logits, atol=1e-5, rtol=0)
    assert torch.equal(stock.generate(prompt, **settings), followed.generate(prompt, layer_indices=indices, **settings))


@pytest.mark.parametrize("path", BLOCKS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", STOCK)
def test_the_stock_model_gives_what_the_path_gives(family, tied, path, stock_checkpoint, tmp_path):
    base = stock_checkpoint(family, tie_word_embeddings=tied)
    exported = export(base, path, tmp_path / "out")
    assert_same(exported, base, BLOCKS[path])
    names = stock_checkpoint_names(exported)
    assert ("lm_head.weight" in names) is not tied


def stock_checkpoint_names(folder: Path) -> set[str]:
    return set(stock_checkpoint.Source(str(folder)).files())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", STOCK)
def test_shards_in_and_out(family, tied, stock_checkpoint, tmp_path):
    base = sharded(stock_checkpoint(family, tie_word_embeddings=tied), tmp_path / "base")
    exported = export(base, "skip 0; repeat 3", tmp_path / "out", "--max_shard_size", "70KB")
    sizes = [file.stat().st_size for file in exported.glob("*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) < 74_000, "one file is in memory at a time; 4 KB for its header"
    assert_same(exported, base, [1, 2, 3, 3, 4, 5])


@pytest.mark.parametrize("path", BLOCKS)
@pytest.mark.parametrize("says", ["layer_types", "max_window_layers"])
def test_sliding_attention_stays_with_its_blocks(says, path, stock_checkpoint, tmp_path):
    base = stock_checkpoint("qwen2", **SLIDING, layer_types=None)
    config = Path(base, "config.json")
    fields = json.loads(config.read_text())
    assert fields["layer_types"] == ["full_attention"] * 3 + ["sliding_attention"] * 3
    copy = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(copy)
    if says == "max_window_layers":  # as older releases wrote it
        del fields["layer_types"]
    (copy / "config.json").write_text(json.dumps(fields))
    assert_same(export(str(copy), path, tmp_path / "out"), str(copy), BLOCKS[path])


def test_the_base_weights_of_a_routed_checkpoint(stock_checkpoint, tmp_path):
    base = stock_checkpoint("qwen3")
    retrofit(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "routed")
    exported = export(str(tmp_path / "routed"), "", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert fingerprint(model) == fingerprint(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    assert sorted(file.name for file in exported.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert "auto_map" not in json.loads((exported / "config.json").read_text())


def test_tokenizer_template_and_licence_come_along(tiny_base, tmp_path):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(base)
    (base / "LICENSE.txt").write_text("free")
    (base / "train.py").write_text("")
    exported = export(str(base), "repeat 4", tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(exported)
    assert loaded.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "w1!"
    assert (exported / "LICENSE.txt").read_text() == "free"
    assert not (exported / "train.py").exists()
    card = (exported / "README.md").read_text()
    assert "    0 1 2 3 4 4\n" in card
    assert "repeat 4" in card


def test_mergekit_gets_the_slices_of_the_plain_base(stock_checkpoint, tmp_path, capsys):
    base = stock_checkpoint("llama")
    retrofit(base, revision=None).save_pretrained(tmp_path / "routed")
    folder = export(str(tmp_path / "routed"), "skip 1; repeat 4-5", tmp_path / "out", "--format", "mergekit")
    recipe = yaml.safe_load((folder / "mergekit.yaml").read_text())
    assert recipe["merge_method"] == "passthrough"
    sources = [source for part in recipe["slices"] for source in part["sources"]]
    assert {source["model"] for source in sources} == {base}
    assert [source["layer_range"] for source in sources] == [[0, 1], [2, 5], [4, 6], [5, 6]]
    assert [file.name for file in folder.iterdir()] == ["mergekit.yaml"]


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("skip 5", "--path: the model has only 5 blocks, from 0 on; there is no block 5"),
        ("skip 0-4", "--path skip 0-4: it runs 0 blocks; llama.cpp takes 1 to 9"),
        ("repeat 0-4", "--path repeat 0-4: it runs 10 blocks; llama.cpp takes 1 to 9"),
        ("skip 1, repeat 1", "--path: block 1 is edited twice"),
        ("skip one", "--path: 'skip one' is not a list of edits"),
    ],
)
@pytest.mark.parametrize("form", ["checkpoint", "mergekit"])
def test_a_wrong_path(form, path, sentence, tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stock_checkpoint, "MAX_BLOCKS", 9)
    assert main([str(tiny_base), "--path", path, "--output_dir", str(tmp_path / "out"), "--format", form]) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def damage(folder: Path, **changes) -> None:
    config = folder / "config.json"
    fields = json.loads(config.read_text()) | changes
    config.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (
            lambda base: damage(base, quantization_config={"quant_method": "gptq"}),
            "base is quantised; pass the unquantised",
        ),
        (lambda base: damage(base, model_type="gpt2"), "model_type 'gpt2' is not one of llama, qwen2, qwen3"),
        (lambda base: damage(base, num_hidden_layers=None), "config.json has no num_hidden_layers"),
        (lambda base: (base / "model.safetensors").unlink(), "has no model.safetensors; save the model again"),
        (lambda base: (base / "model.safetensors").write_bytes(b"short"), "cannot load the model"),
        (lambda base: (base.parent / "out").mkdir(), "out exists; name a new folder"),
    ],
)
def test_a_wrong_checkpoint_or_folder(harm, sentence, tiny_base, tmp_path, capsys):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(base)
    harm(base)
    before = sorted(tmp_path.iterdir())
    assert main([str(base), "--path", "skip 1", "--output_dir", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_the_copies_of_a_repeated_block_can_share_their_weights(stock_checkpoint, tmp_path):
    """The lines of docs/serving.md, at another place."""
    model = AutoModelForCausalLM.from_pretrained(export(stock_checkpoint("qwen2"), "repeat 2", tmp_path / "out"))
    prompt = torch.arange(1, 13)[None]
    before = model(prompt).logits
    (code,) = re.findall(r"```python\n(layers = .*?)```", (ROOT / "docs" / "serving.md").read_text(), re.S)
    exec(code.replace("(17, 18)", "(2, 3)"), {"model": model})
    assert torch.equal(model(prompt).logits, before)
    kept, copy = (model.model.layers[place].mlp.up_proj.weight for place in (2, 3))
    assert kept.data_ptr() == copy.data_ptr()
