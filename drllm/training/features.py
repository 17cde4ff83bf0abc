"""Router inputs, computed once: one pass of the frozen model along the labelled paths.

Under teacher forcing the hidden states follow the labelled path, so what a router sees does not depend on the
routers. One pass over the questions therefore yields the router inputs of every epoch: W pooled windows of d numbers
for each of the L routers. They are stored on disk in shards of safetensors and memory-mapped in training.

A store lives in a folder named after its key (model weights, tokens and paths, windows, dtype, kind of input), so
features of other settings are never mistaken for these. Shards are written atomically: an interrupted pass is resumed
where it stopped, and a shard that is cut off or belongs to another key is computed again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open

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


@dataclass
class FeatureStore:
    """Memory-mapped router inputs, one entry per example.

    Attributes:
        directory: the folder of the shards.
        examples: one per entry, in their order.
        layers: L, the number of routers.
        statistics: cost of the pass that opened this store.
    """

    directory: Path
    examples: Sequence[Example]
    layers: int
    statistics: PassStatistics = field(default_factory=PassStatistics)
    _windows: list[torch.Tensor] = field(default_factory=list, repr=False)
    _num_valid: torch.Tensor | None = field(default=None, repr=False)
    _labels: torch.Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> torch.Tensor:
        """int8 [N, L]: the labelled paths."""
        if self._labels is None:
            self._labels = torch.tensor([e.path for e in self.examples], dtype=torch.int8)
        return self._labels

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Router inputs of some examples.

        Returns:
            windows [B, L, W, d] in the dtype of the model ([B, 1, W, d] when all routers read the embeddings),
            window_mask bool [B, W], labels int64 [B, L].
        """
        rows = torch.as_tensor(indices)
        windows = torch.stack([self._windows[i // SHARD_EXAMPLES][i % SHARD_EXAMPLES] for i in rows.tolist()])
        positions = torch.arange(windows.shape[2])
        return {
            "windows": windows,
            "window_mask": positions < self._num_valid[rows].unsqueeze(1),
            "labels": self.labels[rows].long(),
        }


@dataclass(frozen=True)
class _Layout:
    """The shards of a store: where they are, and what they hold (windows [n, *shape] in `dtype`, key `digest`)."""

    folder: Path
    digest: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    shards: list[range]

    def path(self, shard: int) -> Path:
        return shard_path(self.folder, shard, len(self.shards))

    def open(self, shard: int) -> tuple[torch.Tensor, torch.Tensor] | None:
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
        say: prints progress, on the main process.

    Raises:
        UserError: not enough space on the disk, hidden states that are not finite, a prompt without tokens.
    """
    state = state or PartialState()
    config = model.config
    model_fingerprint = config.base_model_fingerprint or fingerprint(model)
    key = feature_key(examples, model_fingerprint, config.num_windows, config.router_input, model.dtype)
    stored_layers = 1 if config.router_input == "embeddings" else config.num_hidden_layers
    layout = _Layout(
        Path(directory) / key_digest(key),
        key_digest(key),
        (stored_layers, config.num_windows, config.hidden_size),
        model.dtype,
        shard_ranges(len(examples)),
    )
    for example in examples:
        if not example.token_ids:
            raise UserError(f"question {example.question}: its prompt has no tokens; remove it from the labels")

    if state.is_main_process:
        with disk_errors(layout.folder):
            layout.folder.mkdir(parents=True, exist_ok=True)
        manifest = layout.folder / "features.json"
        if not manifest.exists():
            write_json(manifest, {"key": key, "shape": ["examples", *layout.shape]})
    state.wait_for_everyone()
    missing = [shard for shard in range(len(layout.shards)) if layout.open(shard) is None]
    # All processes look before any of them writes, so that they agree on what is missing.
    state.wait_for_everyone()
    statistics = PassStatistics()
    if not missing:
        if state.is_main_process:
            say(f"features: all {len(examples)} examples are stored in {layout.folder}, nothing to compute")
    else:
        if state.is_main_process:
            _announce(say, layout, sum(len(layout.shards[shard]) for shard in missing), len(examples))
        statistics = _ShardPass(model, examples, layout, pad_token_id, batch_size, state, say).run(
            missing[state.process_index :: state.num_processes]
        )
        state.wait_for_everyone()
        if state.num_processes > 1:
            statistics = _of_all_processes(statistics)
    return _open_store(layout, examples, config.num_hidden_layers, statistics)


def _open_store(layout: _Layout, examples: Sequence[Example], layers: int, statistics: PassStatistics) -> FeatureStore:
    store = FeatureStore(layout.folder, examples, layers, statistics)
    num_valid = []
    for number in range(len(layout.shards)):
        shard = layout.open(number)
        if shard is None:
            raise UserError(f"{layout.path(number)} cannot be read back; is the disk full?")
        store._windows.append(shard[0])
        num_valid.append(shard[1])
    store._num_valid = torch.cat(num_valid).long()
    return store


@dataclass
class _ShardPass:
    """One process's share of the pass over the examples."""

    model: Any
    examples: Sequence[Example]
    layout: _Layout
    pad_token_id: int
    batch_size: int
    state: PartialState
    say: Callable[[str], None]
    statistics: PassStatistics = field(default_factory=PassStatistics)
    last_report: float | None = None

    def run(self, shards: Sequence[int]) -> PassStatistics:
        """Computes and writes `shards`."""
        start = time.perf_counter()
        total = sum(len(self.layout.shards[shard]) for shard in shards)
        for shard in shards:
            rows = self.layout.shards[shard]
            windows = torch.zeros((len(rows), *self.layout.shape), dtype=self.layout.dtype)
            num_valid = torch.zeros(len(rows), dtype=torch.uint8)
            of_shard = [self.examples[row] for row in rows]
            for places, read, mask in windows_in_batches(self.model, of_shard, self.batch_size, self.pad_token_id):
                self._count([of_shard[place] for place in places], read)
                read = read.masked_fill(~mask[:, None, :, None], 0)[:, : self.layout.shape[0]]
                windows[places, :, : read.shape[2]] = read.to("cpu", self.layout.dtype)
                num_valid[places] = mask.sum(1).to("cpu", torch.uint8)
                self._report(start, total)
            write_shard(self.layout.path(shard), windows, num_valid, self.layout.digest)
        self.statistics.seconds = time.perf_counter() - start
        if self.state.is_main_process:
            self.say(f"features: done in {duration(self.statistics.seconds)}")
        return self.statistics

    def _count(self, batch: Sequence[Example], windows: torch.Tensor) -> None:
        """Counts what a batch cost; refuses windows that are not finite."""
        if not torch.isfinite(windows).all():
            bad = (~torch.isfinite(windows)).flatten(1).any(1).nonzero()[0].item()
            raise UserError(
                f"question {batch[bad].question}: the model's hidden states are not finite in "
                f"{dtype_name(self.model.dtype)}; make the labels in another dtype (--dtype bfloat16 or float32)"
            )
        self.statistics.examples += len(batch)
        self.statistics.forward_passes += 1
        self.statistics.block_applications += int(self.model.block_applications.sum())

    def _report(self, start: float, total: int) -> None:
        now = time.perf_counter()
        if not self.state.is_main_process or (self.last_report is not None and now - self.last_report < 10):
            return
        done = self.statistics.examples
        left = (now - start) / done * (total - done)
        whose = " of the first process" if self.state.num_processes > 1 else ""
        self.say(f"features: {done} of {total} examples{whose}, about {duration(left)} left")
        self.last_report = now


def _of_all_processes(own: PassStatistics) -> PassStatistics:
    gathered = gather_object([own])
    return PassStatistics(
        examples=sum(s.examples for s in gathered),
        forward_passes=sum(s.forward_passes for s in gathered),
        block_applications=sum(s.block_applications for s in gathered),
        seconds=max(s.seconds for s in gathered),
    )


def _announce(say: Callable[[str], None], layout: _Layout, todo: int, total: int) -> None:
    layers, windows, width = layout.shape
    needed = todo * layers * windows * width * layout.dtype.itemsize
    reused = f", {total - todo} more are already stored" if todo < total else ""
    say(
        f"features: {todo} examples x {layers} routers x {windows} windows x {width} numbers in "
        f"{dtype_name(layout.dtype)}: {size(needed)} in {layout.folder}{reused}"
    )
    free = shutil.disk_usage(layout.folder).free
    if needed > free:
        raise UserError(
            f"the features need {size(needed)}, but only {size(free)} are free in {layout.folder}; pass a folder on a "
            "larger disk with --features_dir"
        )


def size(num_bytes: float) -> str:
    """12.3 MB for 12_300_000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def duration(seconds: float) -> str:
    """ "45 s", "3.2 min" or "1.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def shard_ranges(count: int) -> list[range]:
    """The examples of each shard."""
    return [range(start, min(start + SHARD_EXAMPLES, count)) for start in range(0, count, SHARD_EXAMPLES)]


def shard_path(store_dir: Path, shard: int, shards: int) -> Path:
    """The file of shard number `shard` (from 0) of `shards`."""
    return store_dir / f"features-{shard + 1:05d}-of-{shards:05d}.safetensors"


def write_shard(path: Path, windows: torch.Tensor, num_valid: torch.Tensor, digest: str) -> None:
    """Write windows [n, L, W, d] and the number of valid ones uint8 [n] under a key, atomically."""
    write_tensors(path, {"windows": windows, "num_valid": num_valid}, metadata={"key": digest})
