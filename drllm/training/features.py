"""Router inputs, computed once: one pass of the frozen model along the labelled paths.

Under teacher forcing the hidden states follow the labelled path, so what a router sees does not depend on the
routers. One pass over the questions therefore yields the router inputs of every epoch: W pooled windows of d numbers
for each of the L routers. They are stored on disk in shards of safetensors and memory-mapped in training.

A store lives in a folder named after its key (model weights, tokens and paths, windows, dtype, kind of input), so
features of other settings are never mistaken for these. Shards are written atomically: an interrupted pass is resumed
where it stopped, and a shard that is cut off or belongs to another key is computed again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from drllm.errors import UserError
from drllm.files import disk_errors, write_json, write_tensors
from drllm.labels import Example
from drllm.provenance import dtype_name, fingerprint
from drllm.rollouts.routed_paths import windows_in_batches

FORMAT = 1
SHARD_EXAMPLES = 64


@dataclass
class PassStatistics:
    """What a pass over the data cost. Reused shards cost nothing."""

    examples: int = 0
    forward_passes: int = 0
    block_applications: int = 0
    seconds: float = 0.0


def feature_key(
    examples: Sequence[Example], model_fingerprint: str, num_windows: int, router_input: str, dtype: torch.dtype
) -> dict:
    """Everything the features depend on. Two stores with equal keys hold the same numbers."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.token_ids, example.path]).encode())
    return {
        "format": FORMAT,
        "model_fingerprint": model_fingerprint,
        "examples": len(examples),
        "examples_sha256": digest.hexdigest(),
        "num_windows": num_windows,
        "router_input": router_input,
        "dtype": dtype_name(dtype),
    }


def key_digest(key: dict) -> str:
    """A short name for a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


class FeatureStore:
    """Memory-mapped router inputs, one entry per example.

    Attributes:
        directory: the folder of the shards, named after the store's key.
        examples: one per entry, in their order.
        statistics: cost of the pass that filled this store.
    """

    def __init__(self, folder: Path, examples: Sequence[Example], key: dict, shape: Sequence[int], dtype: torch.dtype):
        self.digest = key_digest(key)
        self.directory = folder / self.digest
        self.examples = examples
        self.key = key
        self.shape = tuple(shape)  # of the windows of one example: [L or 1, W, d]
        self.dtype = dtype
        self.shards = shard_ranges(len(examples))
        self.labels = torch.tensor([example.path for example in examples], dtype=torch.int8)  # [N, L]
        self.statistics = PassStatistics()
        self._windows: list[torch.Tensor] = []
        self._num_valid = torch.empty(0)

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return shard_path(self.directory, shard, len(self.shards))

    def read(self, shard: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(windows, num_valid), memory-mapped; None when the shard is missing, cut off or of another key."""
        rows = len(self.shards[shard])
        try:
            with safe_open(self.path(shard), framework="pt") as file:
                if (file.metadata() or {}).get("key") != self.digest:
                    return None
                windows, num_valid = file.get_tensor("windows"), file.get_tensor("num_valid")
        except (SafetensorError, OSError):
            return None
        if tuple(windows.shape) != (rows, *self.shape) or windows.dtype != self.dtype or len(num_valid) != rows:
            return None
        return windows, num_valid

    def open(self) -> FeatureStore:
        """Itself with all shards mapped, for `batch`; UserError when one cannot be read back."""
        num_valid = []
        for number in range(len(self.shards)):
            shard = self.read(number)
            if shard is None:
                raise UserError(f"{self.path(number)} cannot be read back; is the disk full?")
            self._windows.append(shard[0])
            num_valid.append(shard[1])
        self._num_valid = torch.cat(num_valid).long()
        return self

    def on(self, device: torch.device) -> FeatureStore:
        """A copy with all numbers on `device`: `batch` then waits neither for the disk nor for a transfer."""
        copied = copy.copy(self)
        copied._windows = [shard.to(device) for shard in self._windows]
        copied.labels, copied._num_valid = self.labels.to(device), self._num_valid.to(device)
        return copied

    def fits(self, device: torch.device) -> bool:
        """Whether `device` is a GPU with free memory for twice the windows."""
        needed = 2 * len(self.examples) * math.prod(self.shape) * self.dtype.itemsize
        return device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > needed

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Router inputs of some examples.

        Returns:
            windows [B, L, W, d] in the dtype of the model ([B, 1, W, d] when all routers read the embeddings),
            window_mask bool [B, W], labels int64 [B, L].
        """
        rows = torch.as_tensor(indices)
        windows = torch.stack([self._windows[i // SHARD_EXAMPLES][i % SHARD_EXAMPLES] for i in rows.tolist()])
        positions = torch.arange(windows.shape[2], device=windows.device)
        return {
            "windows": windows,
            "window_mask": positions < self._num_valid[rows].unsqueeze(1),
            "labels": self.labels[rows].long(),
        }


def compute_features(
    model,
    examples: Sequence[Example],
    directory: Path,
    pad_token_id: int = 0,
    batch_size: int = 16,
    state: PartialState | None = None,
    say: Callable[[str], None] = print,
) -> FeatureStore:
    """Run the frozen model once along the labelled paths, or reuse what an earlier run stored.

    Each example runs through each block as often as its path says, once, regardless of the number of epochs. Rows of
    a batch follow different paths. Several processes (accelerate launch) share the shards.

    Args:
        model: a routed model (train_models); its config names the windows and the routers' input.
        examples: what to compute.
        directory: folder of stores; this one gets a subfolder named after its key.
        pad_token_id: padding token; masked.
        batch_size: prompts per forward pass.
        state: the processes at work; None for one process.
        say: prints a line.

    Raises:
        UserError: not enough space on the disk, hidden states that are not finite, a prompt without tokens.
    """
    state = state or PartialState()
    config = model.config
    model_fingerprint = config.base_model_fingerprint or fingerprint(model)
    key = feature_key(examples, model_fingerprint, config.num_windows, config.router_input, model.dtype)
    stored_layers = 1 if config.router_input == "embeddings" else config.num_hidden_layers
    shape = (stored_layers, config.num_windows, config.hidden_size)
    store = FeatureStore(Path(directory), examples, key, shape, model.dtype)
    for example in examples:
        if not example.token_ids:
            raise UserError(f"question {example.question}: its prompt has no tokens; remove it from the labels")
    if state.is_main_process:
        with disk_errors(store.directory):
            store.directory.mkdir(parents=True, exist_ok=True)
        write_json(store.directory / "features.json", {"key": key, "shape": ["examples", *shape]})
    state.wait_for_everyone()
    missing = [shard for shard in range(len(store.shards)) if store.read(shard) is None]
    # All processes look before any of them writes, so that they agree on what is missing.
    state.wait_for_everyone()
    if state.is_main_process:
        _announce(say, store, sum(len(store.shards[shard]) for shard in missing))
    if missing:
        own = missing[state.process_index :: state.num_processes]
        _fill(store, own, model, pad_token_id, batch_size, is_shown=state.is_main_process)
        state.wait_for_everyone()
        if state.num_processes > 1:
            store.statistics = _of_all_processes(store.statistics)
    return store.open()


def _fill(
    store: FeatureStore, shards: Sequence[int], model, pad_token_id: int, batch_size: int, is_shown: bool
) -> None:
    """Computes and writes `shards`, and counts what that costs."""
    start, statistics = time.perf_counter(), store.statistics
    total = sum(len(store.shards[shard]) for shard in shards)
    with tqdm(total=total, desc="features", unit="prompt", mininterval=1, disable=not is_shown) as progress:
        for shard in shards:
            rows = store.shards[shard]
            windows = torch.zeros((len(rows), *store.shape), dtype=store.dtype)
            num_valid = torch.zeros(len(rows), dtype=torch.uint8)
            of_shard = [store.examples[row] for row in rows]
            for places, read, mask in windows_in_batches(model, of_shard, batch_size, pad_token_id):
                finite = torch.isfinite(read).flatten(1).all(1).tolist()
                if not all(finite):
                    raise UserError(
                        f"question {of_shard[places[finite.index(False)]].question}: the model's hidden states are not "
                        f"finite in {dtype_name(model.dtype)}; make the labels in another dtype (--dtype bfloat16 or "
                        "float32)"
                    )
                statistics.examples += len(places)
                statistics.forward_passes += 1
                statistics.block_applications += int(model.block_applications.sum())
                read = read.masked_fill(~mask[:, None, :, None], 0)[:, : store.shape[0]]
                windows[places, :, : read.shape[2]] = read.to("cpu", store.dtype)
                num_valid[places] = mask.sum(1).to("cpu", torch.uint8)
                progress.update(len(places))
            write_shard(store.path(shard), windows, num_valid, store.digest)
    statistics.seconds = time.perf_counter() - start


def _of_all_processes(own: PassStatistics) -> PassStatistics:
    gathered = gather_object([own])
    return PassStatistics(
        examples=sum(s.examples for s in gathered),
        forward_passes=sum(s.forward_passes for s in gathered),
        block_applications=sum(s.block_applications for s in gathered),
        seconds=max(s.seconds for s in gathered),
    )


def _announce(say: Callable[[str], None], store: FeatureStore, todo: int) -> None:
    total = len(store.examples)
    if not todo:
        say(f"features: all {total} examples are stored in {store.directory}, nothing to compute")
        return
    layers, windows, width = store.shape
    needed = todo * layers * windows * width * store.dtype.itemsize
    reused = f", {total - todo} more are already stored" if todo < total else ""
    say(
        f"features: {todo} examples x {layers} routers x {windows} windows x {width} numbers in "
        f"{dtype_name(store.dtype)}: {size(needed)} in {store.directory}{reused}"
    )
    free = shutil.disk_usage(store.directory).free
    if needed > free:
        raise UserError(
            f"the features need {size(needed)}, but only {size(free)} are free in {store.directory}; pass a folder on "
            "a larger disk with --features_dir"
        )


def size(num_bytes: float) -> str:
    """12.3 MB for 12_300_000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def shard_ranges(count: int) -> list[range]:
    """The examples of each shard."""
    return [range(start, min(start + SHARD_EXAMPLES, count)) for start in range(0, count, SHARD_EXAMPLES)]


def shard_path(store_dir: Path, shard: int, shards: int) -> Path:
    """The file of shard number `shard` (from 0) of `shards`."""
    return store_dir / f"features-{shard + 1:05d}-of-{shards:05d}.safetensors"


def write_shard(path: Path, windows: torch.Tensor, num_valid: torch.Tensor, digest: str) -> None:
    """Write windows [n, L, W, d] and the number of valid ones uint8 [n] under a key, atomically."""
    write_tensors(path, {"windows": windows, "num_valid": num_valid}, metadata={"key": digest})
