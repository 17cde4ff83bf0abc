"""Router inputs, computed once: one pass of the frozen model along the labelled paths.

Under teacher forcing the hidden states follow the labelled path, so what a router sees does not depend on the
routers. One pass over the questions therefore yields the router inputs of every epoch: W pooled windows of d numbers
for each of the L routers. They are kept on disk in shards of safetensors and memory-mapped by the training.

A store lives in a folder named after its key (model weights, tokens and paths, windows, dtype, kind of input), so
features of other settings are never mistaken for these. Shards are written whole or not at all: an interrupted pass
continues where it stopped, and a shard that was cut off or belongs to another key is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from drllm.errors import UserError
from drllm.files import write_whole
from drllm.provenance import dtype_name
from drllm.questions.padding import pad_ids
from train_models.paths import path_to_layer_indices

FORMAT = 1
SHARD_EXAMPLES = 64


@dataclass(frozen=True)
class Example:
    """One labelled path of one question.

    Attributes:
        question: identity of the question, "set/question_id"; splits keep a question's examples together.
        token_ids: the prompt, as the search fed it to the model.
        path: [L] values 0/1/2.
    """

    question: str
    token_ids: tuple[int, ...]
    path: tuple[int, ...]


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
    """Memory-mapped router inputs, one entry an example.

    Attributes:
        directory: the folder of the shards.
        examples: in the order of the entries.
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
            windows [B, L, W, d] in the dtype of the model ([B, 1, W, d] when all routers see the embeddings),
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


def compute_features(
    model,
    examples: Sequence[Example],
    directory: Path,
    *,
    model_fingerprint: str,
    pad_token_id: int = 0,
    batch_size: int = 16,
    state: PartialState | None = None,
    say: Callable[[str], None] = print,
) -> FeatureStore:
    """Run the frozen model once along the labelled paths, or reuse what an earlier run stored.

    Each example runs through each block as often as its path says, once, whatever the number of epochs. Rows of
    a batch follow different paths. Several processes (accelerate launch) take turns over the shards.

    Args:
        model: a routed model (train_models); its config names the windows and the routers' input.
        examples: what to compute.
        directory: where stores live; this one gets a subfolder named after its key.
        model_fingerprint: of the base weights.
        pad_token_id: fills up batches; masked.
        batch_size: prompts a forward pass.
        state: the processes at work; None for one process.
        say: prints progress, on the main process.

    Raises:
        UserError: not enough room on the disk, hidden states that are not finite, a prompt without tokens.
    """
    state = state or PartialState()
    config = model.config
    key = feature_key(examples, model_fingerprint, config.num_windows, config.router_input, model.dtype)
    digest = key_digest(key)
    store_dir = Path(directory) / digest
    layers = config.num_hidden_layers
    stored_layers = 1 if config.router_input == "embeddings" else layers
    shape = (stored_layers, config.num_windows, config.hidden_size)
    shards = shard_ranges(len(examples))
    for example in examples:
        if not example.token_ids:
            raise UserError(f"question {example.question}: its prompt has no tokens; remove it from the labels")

    if state.is_main_process:
        store_dir.mkdir(parents=True, exist_ok=True)
        manifest = store_dir / "features.json"
        if not manifest.exists():
            write_whole(manifest, json.dumps({"key": key, "shape": ["examples", *shape]}, indent=2) + "\n")
    state.wait_for_everyone()

    missing = [
        s
        for s, rows in enumerate(shards)
        if _open_shard(store_dir, s, len(shards), digest, rows, shape, model.dtype) is None
    ]
    # Everybody looks before anybody writes, so that all agree on what is missing.
    state.wait_for_everyone()
    statistics = PassStatistics()
    if not missing:
        if state.is_main_process:
            say(f"features: all {len(examples)} examples are stored in {store_dir}, nothing to compute")
    else:
        todo = sum(len(shards[s]) for s in missing)
        if state.is_main_process:
            _announce(say, store_dir, shape, todo, len(examples), model.dtype)
        mine = missing[state.process_index :: state.num_processes]
        statistics = _run_shards(
            model, examples, store_dir, shards, mine, digest, shape, pad_token_id, batch_size, state, say
        )
        state.wait_for_everyone()
        if state.num_processes > 1:
            statistics = _of_all_processes(statistics)

    store = FeatureStore(store_dir, examples, layers, statistics)
    num_valid = []
    for s, rows in enumerate(shards):
        shard = _open_shard(store_dir, s, len(shards), digest, rows, shape, model.dtype)
        if shard is None:
            raise UserError(f"{shard_path(store_dir, s, len(shards))} cannot be read back; is the disk full?")
        store._windows.append(shard[0])
        num_valid.append(shard[1])
    store._num_valid = torch.cat(num_valid).long()
    return store


@torch.no_grad()
def router_inputs(model, examples: Sequence[Example], pad_token_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher-forced forward pass over the prompts of a batch.

    Returns:
        windows [B, L, W, d] in the model's dtype and window_mask bool [B, W], both on the model's device.
    """
    output = model.model(
        **pad_ids([e.token_ids for e in examples], pad_token_id, model.device),
        layer_indices=[path_to_layer_indices(e.path) for e in examples],
        use_cache=False,
        output_router_inputs=True,
    )
    return output.router_inputs, output.window_mask


def _run_shards(
    model, examples, store_dir, shards, mine, digest, shape, pad_token_id, batch_size, state, say
) -> PassStatistics:
    statistics = PassStatistics()
    total = sum(len(shards[s]) for s in mine)
    start = last_report = time.perf_counter()
    eta_said = False
    for s in mine:
        rows = shards[s]
        windows = torch.zeros((len(rows), *shape), dtype=model.dtype)
        num_valid = torch.zeros(len(rows), dtype=torch.uint8)
        # Prompts of like length share a batch, so little of the work goes into padding.
        order = sorted(rows, key=lambda i: len(examples[i].token_ids))
        for b in range(0, len(order), batch_size):
            picked = order[b : b + batch_size]
            batch = [examples[i] for i in picked]
            pooled, mask = router_inputs(model, batch, pad_token_id)
            if not torch.isfinite(pooled).all():
                bad = (~torch.isfinite(pooled)).flatten(1).any(1).nonzero()[0].item()
                raise UserError(
                    f"question {batch[bad].question}: the model's hidden states are not finite in "
                    f"{dtype_name(model.dtype)}; make the labels in another dtype (--dtype bfloat16 or float32)"
                )
            where = torch.tensor([i - rows.start for i in picked])
            pooled = pooled.masked_fill(~mask[:, None, :, None], 0)
            windows[where, :, : pooled.shape[2]] = pooled[:, : shape[0]].to("cpu", windows.dtype)
            num_valid[where] = mask.sum(1).to("cpu", torch.uint8)
            statistics.examples += len(batch)
            statistics.forward_passes += 1
            statistics.block_applications += int(model.block_applications.sum())
            now = time.perf_counter()
            if state.is_main_process and (not eta_said or now - last_report > 10):
                left = (now - start) / statistics.examples * (total - statistics.examples)
                whose = " of the first process" if state.num_processes > 1 else ""
                say(f"features: {statistics.examples} of {total} examples{whose}, about {duration(left)} left")
                eta_said, last_report = True, now
        write_shard(shard_path(store_dir, s, len(shards)), windows, num_valid, digest)
    statistics.seconds = time.perf_counter() - start
    if state.is_main_process:
        say(f"features: done in {duration(statistics.seconds)}")
    return statistics


def _of_all_processes(own: PassStatistics) -> PassStatistics:
    everybody = gather_object([own])
    return PassStatistics(
        examples=sum(s.examples for s in everybody),
        forward_passes=sum(s.forward_passes for s in everybody),
        block_applications=sum(s.block_applications for s in everybody),
        seconds=max(s.seconds for s in everybody),
    )


def _announce(say, store_dir: Path, shape, todo: int, total: int, dtype: torch.dtype) -> None:
    example_bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
    needed = todo * example_bytes
    reused = f", {total - todo} more are stored already" if todo < total else ""
    say(
        f"features: {todo} examples x {shape[0]} routers x {shape[1]} windows x {shape[2]} numbers in "
        f"{dtype_name(dtype)}: {size(needed)} in {store_dir}{reused}"
    )
    free = shutil.disk_usage(store_dir).free
    if needed > free:
        raise UserError(
            f"the features need {size(needed)}, but only {size(free)} are free in {store_dir}; "
            "name a larger disk with --features_dir"
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
    """Write windows [n, L, W, d] and the number of valid ones uint8 [n] under a key, whole or not at all."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({"windows": windows, "num_valid": num_valid}, partial, metadata={"key": digest})
    os.replace(partial, path)


def _open_shard(store_dir, shard, shards, digest, rows, shape, dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(windows, num_valid), memory-mapped; None when the shard is missing, cut off or another key's."""
    path = shard_path(store_dir, shard, shards)
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != digest:
                return None
            windows, num_valid = file.get_tensor("windows"), file.get_tensor("num_valid")
    except (FileNotFoundError, SafetensorError, OSError):
        return None
    if tuple(windows.shape) != (len(rows), *shape) or windows.dtype != dtype or len(num_valid) != len(rows):
        return None
    return windows, num_valid
