"""A base model with random weights on disk, whose tokens are words: for programs that load a checkpoint, offline."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from benchmarks.shapes import SHAPES

WORDS = 100
# `AutoTokenizer` replaces the tokenizer of words by its own in a folder of Qwen2.
WORD_SHAPES = sorted(name for name, config in SHAPES.items() if config.model_type == "llama")


def write_random_base(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: str = "cpu") -> int:
    """Writes a checkpoint of `config`, a Llama's, with normal weights drawn on `device`; returns its bytes.

    One file per block: the model is never in memory as a whole. One word, w0 to w99, is one token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(".".join(name.split(".")[:3]), {})[name] = parameter.shape
    weight_map, total = {}, 0
    for number, members in enumerate(groups.values()):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name, size in members.items():
            weights = torch.empty(size, device=device, dtype=dtype).normal_(0.0, 0.02, generator=generator)
            tensors[name] = (weights + (1.0 if "norm" in name else 0.0)).cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(members, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words = {"<pad>": 0, "<unk>": 1, "<eos>": 2} | {f"w{i}": i + 3 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return total


def random_text(rng: random.Random, tokens: int) -> str:
    """So many random words."""
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(tokens))


def prompt_tokens(*sets: str) -> list[int]:
    """Numbers of tokens of real prompts: those of `sets`, or of all, from prompt_lengths.json."""
    lengths = json.loads(Path(__file__).with_name("prompt_lengths.json").read_text())
    return [prompt for name in sets or lengths for prompt, _ in lengths[name]]
