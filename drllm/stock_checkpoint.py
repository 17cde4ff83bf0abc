"""One path as a stock checkpoint: the blocks of the base model in the order in which the path runs them.

No weight changes, so nothing is loaded as a model: tensors are copied from file to file under new names, one shard at a
time. A repeated block is written twice, because each of its visits has a key-value cache of its own.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from safetensors import safe_open

from drllm.checkpoints import checkpoint_info
from drllm.edits import path_of_edits
from drllm.errors import UserError
from drllm.files import check_output_folder, disk_errors, read_json, write_json, write_tensors, write_whole
from drllm.loading import loading
from drllm.provenance import commit
from train_models import FAMILIES
from train_models.paths import path_to_layer_indices
from train_models.routed import RoutedConfigFields

MAX_BLOCKS = 512  # LLAMA_MAX_LAYERS of llama.cpp; vLLM and SGLang have no limit of their own
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
# Beside configuration and weights; a routed checkpoint's code and records stay behind.
KEPT = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json")
KEPT += ("merges.txt", "chat_template*", "additional_chat_templates/*", "LICENSE*", "NOTICE*", "USE_POLICY*")
LAYER = re.compile(r"^((?:model\.)?layers\.)(\d+)(\..+)$")
MERGEKIT = "mergekit.yaml"


class Source:
    """The base model in a plain or a routed checkpoint.

    Attributes:
        name_or_path, revision: a folder or a name on the Hub, and the revision there.
        config: config.json of the plain base model.
        base, base_revision: the plain base model.

    Raises:
        UserError: no such checkpoint, an unsupported family, or quantised weights.
    """

    def __init__(self, name_or_path: str, revision: str | None = None) -> None:
        self.name_or_path, self.revision = str(name_or_path), revision
        info = checkpoint_info(name_or_path, revision=revision)
        if info.family not in FAMILIES:
            raise UserError(f"{name_or_path}: model_type {info.family!r} is not one of {', '.join(FAMILIES)}")
        if "quantization_config" in info.fields:
            raise UserError(f"{name_or_path} is quantised; pass the unquantised model and quantise what is written")
        if type(info.fields.get("num_hidden_layers")) is not int:
            raise UserError(f"{name_or_path}: config.json has no num_hidden_layers; pass an undamaged checkpoint")
        self.config = dict(info.fields)
        self.base, self.base_revision = self.name_or_path, revision
        if info.is_routed:
            if name := self.config.get("base_model_name"):
                self.base, self.base_revision = name, self.config.get("base_model_revision")
            for name in (*(field.name for field in fields(RoutedConfigFields)), "auto_map"):
                self.config.pop(name, None)
            self.config |= {"model_type": info.family, "architectures": [f"{FAMILIES[info.family]}ForCausalLM"]}

    @cached_property
    def folder(self) -> Path:
        """The local folder, downloaded if the checkpoint is on the Hub."""
        if Path(self.name_or_path).is_dir():
            return Path(self.name_or_path)
        with loading(self.name_or_path, "model", self.revision):
            patterns = [*KEPT, "*.safetensors", INDEX]
            return Path(snapshot_download(self.name_or_path, revision=self.revision, allow_patterns=patterns))

    def layer_indices(self, edits: str) -> list[int]:
        """The blocks that a path runs, in order.

        Raises:
            UserError: `edits` is no list of edits, is for another number of blocks, or leaves none or too many.
        """
        try:
            indices = path_to_layer_indices(path_of_edits(edits, self.config["num_hidden_layers"]))
        except ValueError as error:
            raise UserError(f"--path: {error}") from None
        if not 1 <= len(indices) <= MAX_BLOCKS:
            raise UserError(f"--path {edits}: it runs {len(indices)} blocks; llama.cpp takes 1 to {MAX_BLOCKS}")
        return indices

    def files(self) -> dict[str, Path]:
        """The file of each tensor of the base model.

        Raises:
            UserError: no safetensors files, or damaged ones.
        """
        fix = "save the model again with `save_pretrained` of transformers"
        if (self.folder / INDEX).is_file():
            names = read_json(self.folder / INDEX, fix).get("weight_map", {})
        elif (self.folder / WEIGHTS).is_file():
            with loading(self.name_or_path, "model"), safe_open(self.folder / WEIGHTS, framework="pt") as file:
                names = dict.fromkeys(file.keys(), WEIGHTS)
        else:
            raise UserError(f"{self.folder} has no {WEIGHTS}; {fix}")
        return {name: self.folder / file for name, file in names.items() if "routers" not in name.split(".")}


def stock_config(config: dict[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """The config.json of the blocks `indices` of a model with `config`."""
    changed = config | {"num_hidden_layers": len(indices)}
    if config.get("layer_types"):
        changed["layer_types"] = [config["layer_types"][index] for index in indices]
    if config.get("max_window_layers") is not None:  # the first block whose attention slides
        changed["max_window_layers"] = sum(index < config["max_window_layers"] for index in indices)
    return changed


def export_checkpoint(source: Source, edits: str, output_dir: Path, max_shard_size: str = "5GB") -> str:
    """Writes the stock checkpoint of a path; the folder is there only when it is complete.

    Args:
        source: holds the base model.
        edits: the path, see `drllm.edits.parse_edits`.
        output_dir: must not exist.
        max_shard_size: size of a file of weights, one of which is held in memory at a time.

    Returns:
        What was written, as a sentence.

    Raises:
        UserError: a path that does not fit, a damaged checkpoint, a folder that exists, a full disk.
    """
    indices = source.layer_indices(edits)
    _check_new(output_dir)
    files = source.files()
    with loading(source.name_or_path, "model"):
        sizes = {name: _tensor(file, name).nbytes for name, file in files.items()}
    old_names = {new: old for old in files for new in _new_names(old, indices)}
    try:
        shards = split_state_dict_into_shards_factory(
            {new: sizes[old] for new, old in old_names.items()},
            get_storage_size=int,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise UserError(f"--max_shard_size {max_shard_size}: {error}") from None
    partial = output_dir.with_name(f"{output_dir.name}.partial")
    with disk_errors(output_dir):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in (file for pattern in KEPT for file in source.folder.glob(pattern) if file.is_file()):
            target = partial / file.relative_to(source.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    for shard, names in shards.filename_to_tensors.items():
        # Cloned, because safetensors refuses one piece of memory under two names.
        tensors = {new: _tensor(files[old_names[new]], old_names[new]).clone() for new in names}
        write_tensors(partial / shard, tensors, {"format": "pt"})
    if shards.is_sharded:
        write_json(partial / INDEX, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})
    write_json(partial / "config.json", stock_config(source.config, indices))
    write_whole(partial / "README.md", _card(source, edits, indices))
    with disk_errors(output_dir):
        partial.rename(output_dir)
    return (
        f"wrote {output_dir}: {len(indices)} blocks, {_megabytes(shards.metadata['total_size'])}; the base has "
        f"{source.config['num_hidden_layers']}, {_megabytes(sum(sizes.values()))}"
    )


def export_mergekit(source: Source, edits: str, output_dir: Path) -> str:
    """Writes mergekit's passthrough configuration of a path, without weights; as `export_checkpoint` else."""
    indices = source.layer_indices(edits)
    _check_new(output_dir)
    starts = [place for place, index in enumerate(indices) if place == 0 or index != indices[place - 1] + 1]
    runs = [indices[start:end] for start, end in pairwise([*starts, len(indices)])]
    model = source.base + (f"@{source.base_revision}" if source.base_revision else "")
    slices = [{"sources": [{"model": model, "layer_range": [run[0], run[-1] + 1]}]} for run in runs]
    recipe = {"merge_method": "passthrough", "slices": slices}
    with disk_errors(output_dir):
        output_dir.mkdir(parents=True)
    write_whole(output_dir / MERGEKIT, yaml.safe_dump(recipe, sort_keys=False))
    return f"wrote {output_dir / MERGEKIT}: {len(indices)} blocks in {len(runs)} slices"


def _check_new(output_dir: Path) -> None:
    check_output_folder(output_dir, "--output_dir")
    if output_dir.exists():
        raise UserError(f"--output_dir {output_dir} exists; name a new folder")


def _tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)  # mapped, not read


def _new_names(old: str, indices: Sequence[int]) -> list[str]:
    """The names under which a tensor of the base is written: one per visit of its block."""
    if (layer := LAYER.match(old)) is None:
        return [old]
    return [f"{layer[1]}{place}{layer[3]}" for place, index in enumerate(indices) if index == int(layer[2])]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _card(source: Source, edits: str, indices: Sequence[int]) -> str:
    revision = f" at revision `{source.base_revision}`" if source.base_revision else ""
    is_hub_name = not Path(source.base).exists() and source.base.count("/") == 1
    front = [f"base_model: {source.base}\nbase_model_relation: merge"] if is_hub_name else []
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation", *front, "---", ""),
        f"# {Path(source.base).name}: {edits or 'all blocks'}",
        "",
        f"The weights of `{source.base}`{revision}, unchanged, with {len(indices)} blocks in place of",
        f"{source.config['num_hidden_layers']}: these, by their numbers in the base. A repeated one is stored twice.",
        "",
        f"    {' '.join(map(str, indices))}",
        "",
        "A stock checkpoint: no routers, no code, one path for every prompt. Nothing was measured when it was written.",
        "",
        f'Written by `python -m drllm.export_path --path "{edits}"` of a Dr.LLM reproduction, commit {commit()}.',
        "",
    ]
    return "\n".join(lines)
