"""Time and peak memory of train.py at a paper's shape: random weights, 4,000 labels with prompts as long as real ones.

    python benchmarks/training_memory.py --scratch /path/with/35GB --output results/gpu/training.json
    python benchmarks/training_memory.py --scratch DIR --shape d1024x28 --random_features --epochs 1

One run of the training, from loading the base to the finished checkpoint, in a process of its own, on a GPU if there is
one. Reports the seconds of the pass over the questions, those of the epochs and of everything, and

    peak on the card  most allocated memory of the pass and of the epochs, beside the bytes of the weights
    peak resident     all pages of the process in memory, mapped files included, which the system takes back in need
    peak own          without mapped files: what it needs

--random_features puts random router inputs, of the size and in the place of those that the pass stores, where a 3B
model on a CPU would take hours.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import shutil
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from benchmarks.random_base import WORD_SHAPES, prompt_tokens, random_text, write_random_base
from benchmarks.shapes import SHAPES
from drllm import labels
from drllm.arguments import add_shared, check_ranges
from drllm.checkpoints import load_tokenizer
from drllm.errors import UserError, main_guard
from drllm.files import check_output_file, check_output_folder
from drllm.manifests import Manifest
from drllm.provenance import command_line, fingerprint, parse_dtype, write_result
from drllm.training import features
from drllm.training.config import RouterTrainingConfig
from drllm.training.data import load_labels, make_examples
from drllm.training.trainer import quiet_libraries, train_routers

PAPER = {"seconds": 4 * 3600, "peak_bytes": 0.2 * 40e9}  # Section 3: 4 hours, 20% of one 40 GB card


def make_base(folder: Path, shape: str, dtype: str) -> int:
    """The base model; returns the bytes of its weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return write_random_base(folder, copy.deepcopy(SHAPES[shape]), parse_dtype(dtype), device)


def make_labels(folder: Path, base: Path, questions: int, dtype: str) -> None:
    """Random labels in the schema of data_generation.py: one block skipped, in every third also one repeated."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=parse_dtype(dtype))
    num_blocks = model.config.num_hidden_layers
    folder.mkdir(parents=True)
    rng, made, lengths = random.Random(0), [], prompt_tokens()
    for number in range(questions):
        path = [1] * num_blocks
        skipped, repeated = rng.sample(range(num_blocks), 2)
        path[skipped], path[repeated] = 0, 1 + (number % 3 == 0)
        text = random_text(rng, rng.choice(lengths))
        responses = {"base_correct": True, "path_correct": True, "base_response": "", "path_response": ""}
        kind = {"kind": labels.SHORTER, "prompt": text, "good_paths": (tuple(path),)}
        made.append(labels.Label(text, tuple(path), "", "dart-1", f"q{number}", **kind, **responses))
    manifest = Manifest(str(base), fingerprint(model), num_blocks, dtype, arguments={"budget": 2.0}, seed=0)
    labels.write_labels(folder, manifest, made)


def make_features(folder: Path, data: Path, base: Path, dtype: str, num_windows: int = 8) -> None:
    """Random router inputs under the key that train.py looks for."""
    loaded, config = load_labels([str(data)]), AutoConfig.from_pretrained(base)
    examples = make_examples(loaded, load_tokenizer(str(base)))
    key = features.feature_key(examples, loaded.model_fingerprint, num_windows, "previous_layer", parse_dtype(dtype))
    store = folder / features.key_digest(key)
    store.mkdir(parents=True)
    ranges = features.shard_ranges(len(examples))
    for number, rows in enumerate(ranges):
        shape = (len(rows), config.num_hidden_layers, num_windows, config.hidden_size)
        num_valid = torch.full((len(rows),), num_windows, dtype=torch.uint8)
        path = features.shard_path(store, number, len(ranges))
        features.write_shard(path, torch.randn(shape).to(parse_dtype(dtype)), num_valid, features.key_digest(key))


def in_a_process(function, *arguments):
    """The function's result; its memory is freed when its process ends."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


class _Reports(TrainerCallback):
    """Sends what is known when the epochs begin, and after each of them."""

    def __init__(self, connection):
        self._connection, self._start = connection, time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        before = {"seconds_before_the_epochs": time.perf_counter() - self._start}
        self._start = time.perf_counter()
        self._connection.send(before | _card_peak("pass"))

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        seconds = time.perf_counter() - self._start
        self._connection.send({"epochs": round(state.epoch), "epochs_seconds": seconds} | _card_peak("epochs"))


def _card_peak(part: str) -> dict[str, int]:
    if not torch.cuda.is_available():
        return {}
    peak = {f"card_peak_bytes_{part}": torch.cuda.max_memory_allocated()}
    if part == "pass":
        torch.cuda.reset_peak_memory_stats()
    return peak


def train(settings: dict[str, Any], connection) -> None:
    """Trains, in a process of its own; sends figures through `connection`."""
    quiet_libraries()
    record = train_routers(RouterTrainingConfig(**settings), [_Reports(connection)])
    passes = record["base_model_passes"]
    connection.send(
        {
            "pass_seconds": passes["seconds"],
            "pass_forward_passes": passes["forward_passes"],
            "epochs_seconds": record["seconds_training"],
            "seconds_from_load_to_checkpoint": record["seconds"],
        }
    )


def watch(settings: dict[str, Any], report) -> None:
    """Runs `train`; calls `report` with new figures, among them the peaks of the process's memory in bytes."""
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(settings, theirs))
    process.start()
    theirs.close()
    peak: dict[str, int] = {}
    while True:
        try:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in ("VmHWM", "RssAnon"):
                    key = {"VmHWM": "peak_resident_bytes", "RssAnon": "peak_own_bytes"}[name]
                    peak[key] = max(peak.get(key, 0), int(rest.split()[0]) * 1024)
        except OSError:
            pass  # it has ended, or this system has no /proc
        try:
            if ours.poll(0.05):
                report(ours.recv() | peak)
        except EOFError:
            break
    process.join()
    if process.exitcode:
        raise UserError(f"the training ended with status {process.exitcode}")


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Prepares, runs, prints, and writes the result as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scratch", type=Path, required=True, help="folder for about 35 GB, emptied afterwards")
    add("--shape", choices=WORD_SHAPES, default="llama-3.2-3b", help="random weights at this shape")
    add("--questions", type=int, default=4000, help="number of labels")
    add("--epochs", type=int, default=25, help="passes over the labels")
    add("--random_features", action="store_true", help="put random router inputs in place of the pass's")
    add_shared(parser, "dtype", "bfloat16")
    add_shared(parser, "output")
    args = parser.parse_args(argv)
    check_ranges(args, **dict.fromkeys(("questions", "epochs"), (1, math.inf)))
    parse_dtype(args.dtype)
    check_output_folder(args.scratch, "--scratch")
    if args.output is not None:
        check_output_file(args.output, "--output")
    started = time.time()
    scratch = args.scratch / f"training_memory-{os.getpid()}"
    base, data, stored = scratch / "base", scratch / "data", scratch / "features"
    result: dict[str, Any] = {"shape": args.shape, "questions": args.questions, "paper": PAPER}

    def report(figures: dict[str, Any]) -> None:
        result.update(figures)
        peaks = [value for name, value in result.items() if name.startswith("card_peak_bytes")]
        if peaks:
            result["card_peak_over_weights"] = max(peaks) / result["weights_bytes"]
        if args.output is not None:
            command = command_line("python benchmarks/training_memory.py", argv)
            write_result(args.output, result, command=command, seed=0, seconds=time.time() - started)

    try:
        print("making the base model and labels", flush=True)
        result["weights_bytes"] = in_a_process(make_base, base, args.shape, args.dtype)
        in_a_process(make_labels, data, base, args.questions, args.dtype)
        if args.random_features:
            in_a_process(make_features, stored, data, base, args.dtype)
        settings = {
            "data": (str(data),),
            "features_dir": str(stored),
            "output_dir": str(scratch / "checkpoints"),
            "num_epochs": args.epochs,
            "warmup_steps": min(500, args.epochs * args.questions // 16),
        }
        watch(settings, report)
        report({"feature_bytes": sum(path.stat().st_size for path in stored.rglob("*.safetensors"))})
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for name, value in result.items():
        if isinstance(value, int | float):
            print(f"{name:32}{value / 1e9:12.2f} GB" if "bytes" in name else f"{name:32}{value:12,.4g}")


if __name__ == "__main__":
    raise SystemExit(main())
