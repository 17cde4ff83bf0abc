"""Peak memory of train.py at the shape of Llama-3.2-3B with 4,000 questions.

    python benchmarks/training_memory.py --scratch /path/with/25GB --output results/speed/training_memory.json

Makes a base model of that shape (or of --model's) with random weights, 4,000 random labels, and random router inputs
with the size and in the place of those that train.py stores (computing them with a 3B model takes a GPU, or hours).
Then runs train.py for one epoch, from loading the base to the finished checkpoint, and records that process's memory:

    peak resident   all of its pages in memory, mapped files included, which the system reclaims under pressure
    peak own        without mapped files: what it needs
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from drllm import labels
from drllm.arguments import add_shared, check_ranges
from drllm.checkpoints import load_config, load_tokenizer
from drllm.errors import UserError, main_guard
from drllm.files import check_output_file, check_output_folder
from drllm.manifests import Manifest
from drllm.provenance import command_line, fingerprint, write_result
from drllm.training import features
from drllm.training.data import load_labels, make_examples

ROOT = Path(__file__).resolve().parent.parent
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """Sizes of the base model; the defaults are those of Llama-3.2-3B."""

    layers: int = 28
    hidden: int = 3072
    intermediate: int = 8192
    heads: int = 24
    kv_heads: int = 8
    vocabulary: int = 128256


def shape_of(model: str) -> Shape:
    """The shape of a Llama checkpoint. UserError for other families."""
    config = load_config(model)
    if config.model_type != "llama":
        raise UserError(f"--model {model} is a {config.model_type}; this benchmark needs the shape of a Llama")
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=config.vocab_size,
    )


def make_base(folder: Path, shape: Shape) -> None:
    """A bfloat16 Llama with random weights, one file per group of tensors, never in memory as a whole."""
    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(".".join(name.split(".")[:3]), {})[name] = parameter.shape
    weight_map, total = {}, 0
    for number, members in enumerate(groups.values()):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: torch.randn(size).mul_(0.02).bfloat16() for name, size in members.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(members, file)
        total += sum(tensor.numel() * 2 for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)


def make_labels(folder: Path, base: Path, questions: int) -> None:
    """Random labels in the schema of data_generation.py."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    layers = model.config.num_hidden_layers
    rng = random.Random(0)
    folder.mkdir(parents=True)
    made = []
    for i in range(questions):
        path = [1] * layers
        path[rng.randrange(layers)], path[rng.randrange(layers)] = 0, 2
        text = " ".join(f"w{rng.randrange(100)}" for _ in range(120))
        responses = {"base_correct": True, "path_correct": True, "base_response": "", "path_response": ""}
        kind = {"kind": labels.SHORTER, "prompt": text, "good_paths": (tuple(path),)}
        made.append(labels.Label(text, tuple(path), "", "dart-1", f"q{i}", **kind, **responses))
    manifest = Manifest(str(base), fingerprint(model), layers, "bfloat16", arguments={"budget": 2.0}, seed=0)
    labels.write_labels(folder, manifest, made)


def make_features(folder: Path, data: Path, base: Path, num_windows: int = 8) -> int:
    """Random router inputs under the key that train.py looks for; returns their size in bytes."""
    loaded = load_labels([str(data)])
    examples = make_examples(loaded, load_tokenizer(str(base)))
    config = AutoConfig.from_pretrained(base)
    key = features.feature_key(examples, loaded.model_fingerprint, num_windows, "previous_layer", torch.bfloat16)
    store = folder / features.key_digest(key)
    store.mkdir(parents=True)
    ranges = features.shard_ranges(len(examples))
    for number, rows in enumerate(ranges):
        windows = torch.randn(len(rows), config.num_hidden_layers, num_windows, config.hidden_size).bfloat16()
        num_valid = torch.full((len(rows),), num_windows, dtype=torch.uint8)
        path = features.shard_path(store, number, len(ranges))
        features.write_shard(path, windows, num_valid, features.key_digest(key))
    return sum(path.stat().st_size for path in store.iterdir())


def in_a_process(function, *arguments):
    """The function's result; its memory is freed when its process ends."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def watch(command: list[str]) -> dict[str, float]:
    """Run a command; peak resident and own memory in bytes, and seconds."""
    start, peak = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            name, _, rest = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(rest.split()[0]) * 1024)
        time.sleep(0.05)
    if process.wait():
        raise UserError(f"train.py ended with status {process.returncode}")
    return {
        "peak_resident_bytes": peak["VmHWM"],
        "peak_own_bytes": peak["RssAnon"],
        "seconds": time.perf_counter() - start,
    }


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Prepares, runs, prints, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scratch", type=Path, required=True, help="folder for about 25 GB, emptied afterwards")
    parser.add_argument("--questions", type=int, default=4000, help="number of labels")
    add_shared(parser, "model", about=", a Llama, whose shape replaces the arguments below")
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{name} of the base model")
    add_shared(parser, "output")
    args = parser.parse_args(argv)
    check_ranges(args, **dict.fromkeys(("questions", *asdict(Shape())), (1, math.inf)))
    check_output_folder(args.scratch, "--scratch")
    if args.output is not None:
        check_output_file(args.output, "--output")
    if not Path("/proc/self/status").exists():
        raise UserError("memory is read from /proc, which this system does not have; run it on Linux")
    shape = shape_of(args.model) if args.model else Shape(**{name: getattr(args, name) for name in asdict(Shape())})
    started = time.perf_counter()
    scratch = args.scratch / f"training_memory-{os.getpid()}"
    base, data, stored = scratch / "base", scratch / "data", scratch / "features"
    try:
        base.mkdir(parents=True)
        print("making the base model, labels and features", flush=True)
        in_a_process(make_base, base, shape)
        in_a_process(make_labels, data, base, args.questions)
        feature_bytes = in_a_process(make_features, stored, data, base)
        base_bytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        command = [sys.executable, "train.py", "--data", str(data), "--features_dir", str(stored), "--num_epochs", "1"]
        command += ["--output_dir", str(scratch / "checkpoints"), "--warmup_steps", "10"]
        peaks = watch(command)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"\n{args.questions} questions, {shape.layers} blocks of width {shape.hidden}")
    sizes = {"base_model_bytes": base_bytes, "feature_bytes": feature_bytes} | peaks
    for name, value in sizes.items():
        print(f"{name:24}{value / GB:10.2f} GB" if name.endswith("bytes") else f"{name:24}{value:10.0f}")
    if args.output:
        result = {"shape": asdict(shape), "questions": args.questions, "train_seconds": sizes.pop("seconds"), **sizes}
        command = command_line("python benchmarks/training_memory.py", argv)
        write_result(args.output, result, command=command, seed=0, seconds=time.perf_counter() - started)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    raise SystemExit(main())
