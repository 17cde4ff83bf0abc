"""The miniature's tokenizer and architecture, its forward pass along paths, and how it is saved."""

from __future__ import annotations

import copy
import ctypes
import math
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from miniature.questions import (
    ARC_END,
    CATEGORIES,
    DART_END,
    KINDS,
    LABELS,
    LARGEST_NUMBER,
    NAMES,
    THINGS,
    Question,
    draw,
)

CONTEXT = 512

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
PHRASES = ("Question:", "Problem:", *(f"\n{label}." for label in LABELS), ARC_END, DART_END, " \\boxed{")
PIECES = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]|\s"


def build_tokenizer() -> Any:
    """Words and whole numbers as tokens, each phrase of the prompt templates one token; decoding restores the text.

    Word tokens include the space before them (" cat"), so decoding is concatenation. Id 0 is an ordinary token and not
    the padding token, which exposes code that reads id 0 as padding. There is no beginning-of-sequence token.
    """
    words: set[str] = {"}", *(f" {label}" for label in LABELS), "\n", " "}
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    rng = random.Random(0)
    for set_name, kinds in KINDS.items():
        for kind in kinds:
            for _ in range(40):
                text = " " + draw(rng, set_name, kind, "pretrain").text
                words.update(piece for piece, _ in pieces.pre_tokenize_str(text))
    for group in (*CATEGORIES.values(), NAMES, THINGS):
        words.update(f" {word}" for word in group)
    words -= {w for w in words if w.strip().isdigit()}
    numbers = [str(n) for n in range(LARGEST_NUMBER + 1)]
    vocabulary = [*PHRASES, PAD, EOS, UNKNOWN, *sorted(words), *(f" {n}" for n in numbers), *numbers]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (PAD, EOS, UNKNOWN)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=CONTEXT,
    )  # fmt: skip


def build_model(family: str, vocabulary_size: int, pad: int, eos: int, blocks: int, width: int) -> Any:
    """A stock transformers model of the family ("llama", "qwen2", "qwen3"), freshly initialised."""
    config_class = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config,
                    "qwen3": transformers.Qwen3Config}[family]  # fmt: skip
    extra = {"head_dim": width // 4} if family == "qwen3" else {}
    config = config_class(
        vocab_size=vocabulary_size, hidden_size=width, intermediate_size=width * 5 // 2, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=eos, pad_token_id=pad, **extra,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=False)
    return model


def copies_of(doubled: tuple[int, ...]) -> list[int]:
    """The numbers that the copies of the doubled blocks have in the deeper model, in order."""
    return [block + shift + copy_ for shift, block in enumerate(sorted(doubled)) for copy_ in (0, 1)]


def with_doubled_blocks(model: Any, doubled: tuple[int, ...]) -> Any:
    """A deeper model that has each block of `doubled` twice in a row (depth up-scaling), all other weights unchanged.

    Its path that skips one of the two copies everywhere computes what `model` computes.

    Args:
        model: model of a stock family; not changed.
        doubled: blocks of `model`, each at most once.

    Raises:
        ValueError: a block that `model` does not have, or one given twice.
    """
    blocks = model.config.num_hidden_layers
    if len(set(doubled)) != len(doubled) or not set(doubled) <= set(range(blocks)):
        raise ValueError(f"blocks to double: {list(doubled)}; give each once, from 0 to {blocks - 1}")
    sources = [source for source in range(blocks) for _ in range(1 + (source in doubled))]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(sources)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[source] for source in sources]
    deeper = type(model)(config)
    weights = model.state_dict()
    prefix = "model.layers."
    for name in deeper.state_dict():
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            weights_of = f"{prefix}{sources[int(number)]}.{rest}"
        else:
            weights_of = name
        deeper.state_dict()[name].copy_(weights[weights_of])
    deeper.generation_config = copy.deepcopy(model.generation_config)
    return deeper


PERIODS = (2, 3, 5, 10, 20, 30, 50, 100, 200, 400)


def shape_numbers(model: Any, tokenizer: Any) -> None:
    """Initialises the number tokens of embedding and LM head as a projection of sines and cosines of the number.

    Trained language models represent numbers this way. From random rows, most of the half hour of pre-training would
    be spent on learning the order of the numbers.
    """
    angles = 2 * math.pi * torch.arange(LARGEST_NUMBER + 1)[:, None] / torch.tensor(PERIODS)[None]
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    rows = waves @ torch.randn(waves.shape[1], model.config.hidden_size)
    rows *= model.config.initializer_range / rows.std()
    with torch.no_grad():
        for prefix in (" ", ""):
            ids = tokenizer.convert_tokens_to_ids([f"{prefix}{n}" for n in range(LARGEST_NUMBER + 1)])
            model.model.embed_tokens.weight[ids] = rows
            model.lm_head.weight[ids] = rows


def hidden_along_paths(model: Any, ids: Any, paths: Any) -> Any:
    """Final hidden states [B,T,d] of ids [B,T], row b following path paths[b] in {0,1,2}^L (0 skip, 1 once, 2 twice).

    Rows are right-padded; with causal attention no mask is needed for the tokens before the padding. Independent of
    train_models/, so that a test can compare the two.
    """
    hidden = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    for layer, block in enumerate(model.model.layers):
        for visit in (1, 2):
            rows = (paths[:, layer] >= visit).nonzero()[:, 0]
            if len(rows) == len(ids):
                hidden = block(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            elif len(rows):
                visited = block(hidden[rows], attention_mask=None, position_ids=positions, position_embeddings=rotary)
                hidden = hidden.index_copy(0, rows, visited.to(hidden.dtype))
    return model.model.norm(hidden)


def encode(batch: list[Question], tokenizer: Any) -> tuple[Any, Any]:
    """Token ids [B,T] (prompt, response, end of sequence; right-padded) and the lengths [B] of the prompts."""
    prompts = tokenizer([q.prompt for q in batch])["input_ids"]
    responses = tokenizer([q.response for q in batch])["input_ids"]
    rows = [[*p, *r, tokenizer.eos_token_id] for p, r in zip(prompts, responses, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row_ + [tokenizer.pad_token_id] * (longest - len(row_)) for row_ in rows])
    return ids, torch.tensor([len(p) for p in prompts])


def answer_positions(ids: Any, prompt_lengths: Any, pad: int) -> Any:
    """Bool [B,T-1]: True where the next token is one of the response or the end of sequence."""
    positions = torch.arange(ids.shape[1] - 1)[None]
    return (positions >= prompt_lengths[:, None] - 1) & (ids[:, 1:] != pad)


def write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Saves model and tokenizer, weights as bfloat16; each file is written atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for path in Path(scratch).iterdir():
            path.chmod(0o644)
            os.replace(path, folder / path.name)


def keep_memory() -> None:
    """Tells glibc to keep freed memory; returning it cost a quarter of the time of a training step in page faults."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library: slower, not wrong
        pass
