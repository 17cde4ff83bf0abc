"""Small checkpoints: the routers alone, to be sent around and joined with their base model.

    python -m drllm.router_checkpoint extract CHECKPOINT --output_dir ROUTERS
    python -m drllm.router_checkpoint join ROUTERS [--base NAME_OR_PATH] --output_dir CHECKPOINT
    python -m drllm.router_checkpoint push ROUTERS --repo_id USER/NAME

A small checkpoint is a folder of three files: routers.safetensors, router_config.json (the routers' shape, and the
base model's name, revision, size and weight fingerprint) and README.md, the model card. Routers read hidden states,
so they are worth nothing with another base: joining checks layer count, hidden size and fingerprint.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from drllm.errors import UserError, main_guard
from drllm.provenance import dtype_name, fingerprint, parse_dtype
from train_models import retrofit

FORMAT = 1
WEIGHTS, CONFIG, CARD, LABELS = "routers.safetensors", "router_config.json", "README.md", "labels_manifest.json"
ROUTER_FIELDS = ("num_windows", "router_width", "router_depth", "router_input")


def save_checkpoint(routed, tokenizer, directory: Path, manifest: dict | list, training: dict | None = None) -> None:
    """Write a full checkpoint, with its routers alone in the subfolder `routers`.

    Args:
        manifest: what the labels belong to; eval.sh reads there whether prompts have the chat template.
        training: see `save_routers`.
    """
    routed.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for folder in (directory, save_routers(routed, directory / "routers", training)):
        (folder / LABELS).write_text(json.dumps(manifest, indent=2) + "\n")


def save_routers(routed, directory: str | Path, training: dict | None = None) -> Path:
    """Write the routers of a routed model, without its base.

    Args:
        routed: a routed model whose config names the base (base_model_name, ..._revision, ..._fingerprint).
        directory: made if need be.
        training: the training record (training.json of a checkpoint), for the model card.

    Returns:
        The folder.
    """
    directory = Path(directory)
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
        "routers": {name: getattr(config, name) for name in ROUTER_FIELDS}
        | {"num_windows": config.trained_num_windows or config.num_windows},
    }
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CARD).write_text(model_card(description, training))
    (directory / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
    return directory


def join_routers(
    routers: str | Path, base: str | None = None, revision: str | None = None, dtype: torch.dtype | None = None
):
    """A routed model from a small checkpoint and its base.

    Args:
        routers: folder, or Hub name, of a small checkpoint.
        base: folder or Hub name of the base; default: the one named in the checkpoint, at its revision.
        revision: of a base on the Hub.
        dtype: of the joined model; default: the one the routers were saved in, which is the one they were
            trained for.

    Raises:
        UserError: no or damaged small checkpoint; a base with another layer count, hidden size or weights.
    """
    directory = _local_folder(str(routers))
    description = _read_description(directory)
    if base is None:
        base, revision = description["base_model_name"], revision or description["base_model_revision"]
        if not base:
            raise UserError(f"{directory / CONFIG} names no base model; pass one with --base")
    dtype = dtype or parse_dtype(description["dtype"])
    base_config = load_config(base, revision)
    for name in ("num_hidden_layers", "hidden_size"):
        if getattr(base_config, name) != description[name]:
            raise UserError(
                f"{base} is not the base of the routers in {routers}: its {name} is {getattr(base_config, name)}, the "
                f"routers need {description[name]}; their base is {description['base_model_name']}"
            )
    routed = load_routed(base, dtype, revision, description["routers"])
    found = fingerprint(routed)
    if found != description["base_model_fingerprint"]:
        raise UserError(
            f"{base} is not the base of the routers in {routers}: its weights have the fingerprint {found}, the "
            f"routers were trained on {description['base_model_fingerprint']} ({description['base_model_name']}, "
            f"revision {description['base_model_revision']})"
        )
    try:
        weights = load_file(directory / WEIGHTS)
        routed.model.routers.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{directory / WEIGHTS} is missing, cut off or does not fit {CONFIG}: {error}") from None
    routed.config.base_model_name = description["base_model_name"] or base
    routed.config.base_model_revision = revision
    routed.config.base_model_fingerprint = found
    routed.config.trained_num_windows = description["routers"]["num_windows"]
    return routed


def load_config(name_or_path: str, revision: str | None = None):
    """The base model's configuration; UserError when there is none."""
    try:
        return AutoConfig.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {name_or_path}: {_first_line(error)}") from None


def load_routed(name_or_path: str, dtype: torch.dtype, revision: str | None, router_config: dict, seed: int = 0):
    """`train_models.retrofit` with its refusals as one sentence."""
    try:
        return retrofit(name_or_path, dtype=dtype, revision=revision, seed=seed, router_config=router_config)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load the model {name_or_path}: {_first_line(error)}") from None


def load_tokenizer(name_or_path: str, revision: str | None = None):
    """The base model's tokenizer; UserError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {name_or_path}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _local_folder(routers: str) -> Path:
    if Path(routers).is_dir():
        return Path(routers)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(routers, allow_patterns=[WEIGHTS, CONFIG, LABELS]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{routers} is neither a folder nor a reachable repository on the Hub: {_first_line(error)}"
        ) from None


def _read_description(directory: Path) -> dict:
    path = directory / CONFIG
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{directory} is no small checkpoint: it has no {CONFIG}") from None
    except ValueError:
        raise UserError(f"{path} is cut off or no JSON; make the small checkpoint again") from None
    if description.get("format") != FORMAT:
        raise UserError(f"{path} has format {description.get('format')}, this code reads format {FORMAT}")
    return description


def model_card(description: dict, training: dict | None) -> str:
    """The README.md of a small checkpoint, with a table of its training and metrics when they are known."""
    base = description["base_model_name"] or "unknown"
    revision = f" at revision `{description['base_model_revision']}`" if description["base_model_revision"] else ""
    is_hub_name = not Path(base).exists() and base.count("/") <= 1 and base != "unknown"
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if is_hub_name:
        front += [f"base_model: {base}", "base_model_relation: adapter"]
    front += ["tags:", "- dr-llm", "- dynamic-depth", "- layer-routing", "---", ""]
    shape = description["routers"]
    lines = [
        f"# Dr.LLM routers for {Path(base).name}",
        "",
        f"Routers of [Dr.LLM](https://arxiv.org/abs/2510.12773) for `{base}`{revision}: one MLP a block that reads the "
        "prompt and decides to skip, execute or repeat the block. The base model's weights are not changed and not "
        "included.",
        "",
        "| | |",
        "| --- | --- |",
        f"| base model | `{base}`{revision} |",
        f"| base weights (fingerprint) | `{description['base_model_fingerprint']}` |",
        f"| blocks, hidden size | {description['num_hidden_layers']}, {description['hidden_size']} |",
        f"| routers | {description['num_hidden_layers']}, of {shape['router_depth']} linear layers, width "
        f"{shape['router_width']}, {shape['num_windows']} windows, reading {_reads(shape['router_input'])} |",
        f"| parameters | {description['parameters']:,} in {description['dtype']} |",
        "",
    ]
    if training:
        lines += _training_section(training)
    lines += [
        "## Use",
        "",
        "From a checkout of the Dr.LLM reproduction this folder came from:",
        "",
        "```python",
        "from drllm.router_checkpoint import join_routers",
        "",
        f'model = join_routers("path/to/this/folder", base="{base}")',
        "```",
        "",
        "or, to write a checkpoint that `AutoModelForCausalLM` and lm-eval load with `trust_remote_code=True`:",
        "",
        "```",
        "python -m drllm.router_checkpoint join path/to/this/folder --output_dir checkpoints/joined",
        "```",
        "",
        "Another base model is refused: routers read the hidden states they were trained on.",
        "",
    ]
    return "\n".join(front + lines)


def _reads(router_input: str) -> str:
    return "the embeddings" if router_input == "embeddings" else "the output of the block before"


def _training_section(training: dict) -> list[str]:
    metrics, config = training["metrics"], training["config"]
    sets = ", ".join(f"{name} {count}" for name, count in sorted(training["questions_per_set"].items()))
    held_out = f"{training['held_out_examples']} held-out paths" if training["held_out_examples"] else "training paths"
    lines = [
        "## Training",
        "",
        f"Labels: {training['train_examples']} paths to train on ({sets} questions, held-out ones included). "
        f"Loss {config['loss']}, {config['num_epochs']} epochs, effective batch {config['gradient_accumulation']}, "
        f"AdamW at {config['learning_rate']:g} with weight decay {config['weight_decay']:g}, seed {config['seed']}.",
        "",
        f"| metric on {held_out} | value |",
        "| --- | --- |",
    ]
    shown = ("macro_f1", "f1_skip", "f1_execute", "f1_repeat", "acc_skip", "acc_repeat", "avg_layers", "routers_loss")
    return [*lines, *(f"| {name} | {metrics[name]:.4g} |" for name in shown), ""]


def extract(checkpoint: str, output_dir: str) -> Path:
    """Make a small checkpoint from a full one (a folder written by train.py or `join`)."""
    if not (Path(checkpoint) / "config.json").exists():
        raise UserError(f"{checkpoint} is no checkpoint: it has no config.json")
    try:
        routed = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype="auto")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load the checkpoint {checkpoint}: {_first_line(error)}") from None
    if not hasattr(routed.model, "routers"):
        raise UserError(f"{checkpoint} is a plain model without routers")
    record = Path(checkpoint) / "training.json"
    directory = save_routers(routed, output_dir, json.loads(record.read_text()) if record.exists() else None)
    _copy_labels_manifest(Path(checkpoint), directory)
    return directory


def _copy_labels_manifest(source: Path, target: Path) -> None:
    # It says whether prompts had the chat template, which eval.sh follows.
    if (source / LABELS).is_file():
        shutil.copyfile(source / LABELS, target / LABELS)


def push(routers: str, repo_id: str, private: bool = False) -> str:
    """Upload a small checkpoint to the Hub; returns its address. Needs `hf auth login` first."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    _read_description(Path(routers))
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(folder_path=routers, repo_id=repo_id, allow_patterns=[WEIGHTS, CONFIG, CARD, LABELS])
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise UserError(f"cannot push to {repo_id}: {_first_line(error)} (log in with `hf auth login`)") from None
    return f"https://huggingface.co/{repo_id}"


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m drllm.router_checkpoint", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("extract", help="routers of a full checkpoint -> small checkpoint")
    sub.add_argument("checkpoint")
    sub.add_argument("--output_dir", required=True)
    sub = commands.add_parser("join", help="small checkpoint + base -> full checkpoint")
    sub.add_argument("routers", help="folder or Hub name of a small checkpoint")
    sub.add_argument("--base", help="folder or Hub name of the base model (default: the one the checkpoint names)")
    sub.add_argument("--revision", help="revision of a base model on the Hub")
    sub.add_argument("--dtype", help="dtype of the joined checkpoint (default: that of the routers)")
    sub.add_argument("--output_dir", required=True)
    sub = commands.add_parser("push", help="small checkpoint -> Hub")
    sub.add_argument("routers")
    sub.add_argument("--repo_id", required=True)
    sub.add_argument("--private", action="store_true")
    args = parser.parse_args(argv)
    if args.command == "extract":
        print(f"wrote {extract(args.checkpoint, args.output_dir)}")
    elif args.command == "join":
        routed = join_routers(args.routers, args.base, args.revision, parse_dtype(args.dtype) if args.dtype else None)
        tokenizer = load_tokenizer(args.base or routed.config.base_model_name, routed.config.base_model_revision)
        routed.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        _copy_labels_manifest(_local_folder(args.routers), Path(args.output_dir))
        print(f"wrote {args.output_dir}")
    else:
        print(push(args.routers, args.repo_id, args.private))


if __name__ == "__main__":
    raise SystemExit(main())
