"""Writes checkpoints: a routed model, its routers alone, and one from the other (see `drllm.checkpoints`)."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel

from drllm.checkpoints import (
    CARD,
    CONFIG,
    FORMAT,
    ROUTERS,
    WEIGHTS,
    checkpoint_info,
    join_routers,
    load_routed_checkpoint,
    load_tokenizer,
    read_description,
    router_folder,
)
from drllm.errors import UserError
from drllm.files import check_output_folder, disk_errors, read_json, write_json, write_tensors, write_whole
from drllm.loading import one_line
from drllm.manifests import CHECKPOINT_MANIFEST
from drllm.model_card import check_record, model_card
from drllm.provenance import dtype_name, fingerprint, parse_dtype


def save_checkpoint(
    routed: PreTrainedModel, tokenizer, directory: Path, manifest: dict | list, training: dict | None = None
) -> None:
    """Write a routed checkpoint, with its routers alone in the subfolder `routers`.

    Args:
        manifest: manifest of the labels; eval.sh reads there whether prompts have the chat template.
        training: see `save_routers`.

    Raises:
        UserError: the checkpoint cannot be written.
    """
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        routed.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    for folder in (directory, save_routers(routed, directory / "routers", training)):
        write_json(folder / CHECKPOINT_MANIFEST, manifest)
    write_whole(directory / CARD, model_card(read_description(directory / "routers"), training, is_whole=True))


def save_routers(routed: PreTrainedModel, directory: str | Path, training: dict | None = None) -> Path:
    """Write the routers of a routed model, without its base.

    Args:
        routed: a routed model whose config names the base (base_model_name, ..._revision, ..._fingerprint).
        directory: created if needed.
        training: the training record (training.json of a checkpoint), for the model card.

    Returns:
        The folder.

    Raises:
        UserError: the folder cannot be written.
    """
    directory = Path(directory)
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    config = routed.config
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in routed.model.routers.state_dict().items()}
    description = {
        "format": FORMAT,
        "base_model_name": config.base_model_name,
        "base_model_revision": config.base_model_revision,
        "base_model_fingerprint": config.base_model_fingerprint or fingerprint(routed),
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "dtype": dtype_name(next(iter(weights.values())).dtype),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "routers": {name: getattr(config, name) for name in ROUTERS}
        | {"num_windows": config.trained_num_windows or config.num_windows},
    }
    write_tensors(directory / WEIGHTS, weights, metadata={"format": "pt"})
    write_whole(directory / CARD, model_card(description, training))
    write_json(directory / CONFIG, description)
    return directory


def join_to_folder(
    routers: str, output_dir: str | Path, base: str | None = None, revision: str | None = None, dtype: str | None = None
) -> Path:
    """`join_routers`, written as a routed checkpoint."""
    output_dir = Path(output_dir)
    check_output_folder(output_dir, "--output_dir")
    routed = join_routers(routers, base, revision, parse_dtype(dtype) if dtype else None)
    tokenizer = load_tokenizer(base or routed.config.base_model_name, routed.config.base_model_revision)
    with disk_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        routed.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
        _copy_labels_manifest(router_folder(routers), output_dir)
    write_whole(output_dir / CARD, model_card(read_description(router_folder(routers)), None, is_whole=True))
    return output_dir


def extract_routers(checkpoint: str | Path, output_dir: str | Path) -> Path:
    """Write the router checkpoint of a routed checkpoint (a folder written by train.py or by joining)."""
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    check_output_folder(output_dir, "--output_dir")
    checkpoint_info(checkpoint, is_local=True).require_routers()
    record, training = None, checkpoint / "training.json"
    if training.exists():
        fix = "delete the file to extract the routers without it"
        record = read_json(training, fix)
        check_record(record, training, fix)
    routed = load_routed_checkpoint(checkpoint, device="cpu")
    directory = save_routers(routed, output_dir, record)
    with disk_errors(directory):
        _copy_labels_manifest(checkpoint, directory)
    return directory


def push_routers(routers: str, repo_id: str, private: bool = False) -> str:
    """Upload a router checkpoint to the Hub; returns its address. Run `hf auth login` first."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    read_description(Path(routers))
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        names = [WEIGHTS, CONFIG, CARD, CHECKPOINT_MANIFEST]
        api.upload_folder(folder_path=routers, repo_id=repo_id, allow_patterns=names)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise UserError(f"cannot push to {repo_id}: {one_line(error)} (log in with `hf auth login`)") from None
    return f"https://huggingface.co/{repo_id}"


def _copy_labels_manifest(source: Path, target: Path) -> None:
    # eval.sh reads in it whether prompts have the chat template.
    if (source / CHECKPOINT_MANIFEST).is_file() and source.resolve() != target.resolve():
        shutil.copyfile(source / CHECKPOINT_MANIFEST, target / CHECKPOINT_MANIFEST)
