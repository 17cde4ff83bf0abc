"""A tiny base model with a tokenizer, and labels for it in the schema of data_generation.py."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drllm.provenance import fingerprint

WORDS = [f"w{i}" for i in range(60)]
LAYERS = 5


def make_base(directory: Path, layers: int = LAYERS, seed: int = 0, hidden: int = 32) -> Path:
    """A stock Llama of random weights with a word-level tokenizer, saved."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # the stock initialisation is so small that blocks hardly matter
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    model.save_pretrained(directory)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    return directory


def make_labels(
    directory: Path, base: Path, questions: int = 24, seed: int = 0, dtype: str = "float32", sets=("arc_easy", "dart-1")
) -> Path:
    """Label rows whose best path depends on the first word, so that routers have something to learn."""
    rng = random.Random(seed)
    model = LlamaForCausalLM.from_pretrained(base)
    layers = model.config.num_hidden_layers
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(questions):
        words = [rng.choice(WORDS) for _ in range(rng.randint(2, 20))]
        path = [1] * layers
        kind = rng.randrange(3)
        words[0] = WORDS[kind]
        if kind < 2:
            path[1 + kind] = 0
        if kind > 0:
            path[layers - 1] = 2
        other = [1] * layers
        other[0] = 2
        rows.append(
            {
                "question": " ".join(words),
                "optimal_layer_config": path,
                "answer": "A",
                "set": sets[i % len(sets)],
                "question_id": f"q{i}",
                "prompt": " ".join(words),
                "base_correct": True,
                "path_correct": True,
                "base_response": " A",
                "path_response": " A",
                "simulations": 50,
                "inferences": 40,
                "good_paths": [path, other],
                "kind": "shorter",
            }
        )
    (directory / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = {
        "format": 1,
        "model": str(base),
        "revision": None,
        "model_fingerprint": fingerprint(model),
        "num_layers": layers,
        "dtype": dtype,
        "chat_template": False,
        "arguments": {"budget": 2.0},
        "versions": {},
        "commit": None,
        "seed": seed,
        "labels": len(rows),
        "table2": [],
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory
