"""Checkpoints: base models, routed checkpoints, and routers on their own.

A *routed checkpoint* is a full model with routers, as train.py writes it. A *router checkpoint* is a folder with the
routers alone: routers.safetensors, router_config.json (the routers' shape, and the base model's name, revision, size
and weight fingerprint) and README.md, the model card. Routers read hidden states, so they only work with the base model
they were trained on: joining checks layer count, hidden size and fingerprint.

`drllm.saving` writes them. Nothing here runs Python code that a checkpoint carries: routed checkpoints are loaded with
the classes of `train_models`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from drllm.errors import UserError
from drllm.files import read_json, shorten
from drllm.loading import check_complete, check_finite, loading, one_line
from drllm.manifests import CHECKPOINT_MANIFEST
from drllm.provenance import fingerprint, parse_dtype
from drllm.schema import INTEGER, OBJECT, TEXT, Schema, check_fields, or_null
from train_models import retrofit, routed_classes

FORMAT = 1
WEIGHTS, CONFIG, CARD = "routers.safetensors", "router_config.json", "README.md"
ROUTED_PREFIX = "drllm_"
ROUTERS: Schema = {"num_windows": INTEGER, "router_width": INTEGER, "router_depth": INTEGER, "router_input": TEXT}
DESCRIPTION: Schema = {
    "base_model_name": or_null(TEXT),
    "base_model_revision": or_null(TEXT),
    "base_model_fingerprint": TEXT,
    "num_hidden_layers": INTEGER,
    "hidden_size": INTEGER,
    "dtype": TEXT,
    "parameters": INTEGER,
    "routers": OBJECT,
}


# ----------------------------------------------------------------------------------------------------
# Loading


@dataclass(frozen=True)
class CheckpointInfo:
    """What the config.json of a checkpoint says.

    Attributes:
        name_or_path: a folder or a name on the Hub.
        fields: the JSON object.
        is_routed: whether the checkpoint has routers.
        family: model type of the base model: "llama", "qwen2", ...
    """

    name_or_path: str
    fields: dict[str, Any]
    is_routed: bool
    family: str

    def require_routers(self) -> CheckpointInfo:
        """Itself; raises UserError when the checkpoint has no routers."""
        if not self.is_routed:
            raise UserError(
                f"{self.name_or_path} is a plain {self.family or 'unknown'} checkpoint without routers; pass one that "
                "train.py wrote"
            )
        return self

    def routed_classes(self) -> tuple[type, type]:
        """(configuration class, model class) of a routed checkpoint; raises UserError when it has no routers."""
        self.require_routers()
        try:
            return routed_classes(self.family)
        except ValueError as error:
            raise UserError(f"{self.name_or_path}: {error}") from None


def checkpoint_info(name_or_path: str | Path, *, is_local: bool = False, **location: str | None) -> CheckpointInfo:
    """Reads the config.json of a checkpoint: whether it has routers, and of which family it is.

    Args:
        name_or_path: a folder or a name on the Hub.
        is_local: accept a folder only; nothing is looked up on the Hub.
        location: `revision` and `subfolder`, as in `from_pretrained`.

    Raises:
        UserError: no config.json, or a damaged one.
    """
    folder = Path(name_or_path, location.get("subfolder") or "")
    if is_local or folder.exists():
        path = folder / "config.json"
        if not path.is_file():
            raise UserError(f"{folder} is not a checkpoint: it has no config.json; train.py writes one")
        fields = read_json(path, "pass an undamaged checkpoint")
    else:
        path = f"{name_or_path}/config.json"
        with loading(name_or_path, "model", location.get("revision")):
            fields, _ = PretrainedConfig.get_config_dict(str(name_or_path), **location)
    model_type = fields.get("model_type", "")
    if not isinstance(model_type, str):
        raise UserError(f"{path}: 'model_type' is {shorten(model_type)}, expected text")
    is_routed = model_type.startswith(ROUTED_PREFIX)
    if is_routed:
        check_fields(fields, ROUTERS, path, "pass an undamaged checkpoint", may_lack=ROUTERS)
        layers = fields.get("num_hidden_layers", 1)
        if type(layers) is int and layers < 1:
            raise UserError(f"{path}: 'num_hidden_layers' is {layers}, expected at least 1")
    return CheckpointInfo(str(name_or_path), fields, is_routed, model_type.removeprefix(ROUTED_PREFIX))


def load_routed_checkpoint(
    name_or_path: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device | None = None
) -> PreTrainedModel:
    """A routed checkpoint in eval mode, loaded with this repository's classes.

    Args:
        name_or_path: a folder or a name on the Hub.
        dtype: dtype of the weights; "auto" is that of the checkpoint.
        device: where the model goes; None: a GPU if there is one.

    Raises:
        UserError: a missing or damaged checkpoint, one without routers, missing or non-finite weights.
    """
    config_class, model_class = checkpoint_info(name_or_path).routed_classes()
    dtype = dtype if dtype == "auto" else parse_dtype(dtype)
    with loading(name_or_path, "checkpoint"):
        config = config_class.from_pretrained(name_or_path)
        model, report = model_class.from_pretrained(
            name_or_path, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    check_complete(report, name_or_path)
    check_finite(model, name_or_path)
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_config(name_or_path: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a plain model; UserError when there is none."""
    with loading(name_or_path, "model", revision):
        return AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)


def load_routed(
    name_or_path: str, dtype: torch.dtype, revision: str | None, router_config: dict, seed: int = 0
) -> PreTrainedModel:
    """A plain base model with new routers (`train_models.retrofit`).

    Raises:
        UserError: a missing or damaged checkpoint, an unsupported family, non-finite weights.
    """
    with loading(name_or_path, "model", revision):
        routed = retrofit(name_or_path, dtype=dtype, revision=revision, seed=seed, router_config=router_config)
    check_finite(routed, name_or_path)
    return routed


def load_tokenizer(name_or_path: str | Path, revision: str | None = None):
    """The tokenizer of a plain or a routed checkpoint; UserError when there is none."""
    with loading(name_or_path, "tokenizer of", revision):
        config = None
        with contextlib.suppress(UserError):  # a folder may hold a tokenizer alone
            info = checkpoint_info(name_or_path, revision=revision)
            if info.is_routed:  # without it AutoTokenizer would ask for the checkpoint's code
                config = info.routed_classes()[0].from_pretrained(name_or_path, revision=revision)
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision, config=config, trust_remote_code=False)


# ----------------------------------------------------------------------------------------------------
# Routers on their own


def join_routers(
    routers: str | Path, base: str | None = None, revision: str | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A routed model from a router checkpoint and its base model.

    Args:
        routers: folder, or Hub name, of a router checkpoint.
        base: folder or Hub name of the base; default: the one named in the router checkpoint, at its revision.
        revision: revision of a base on the Hub.
        dtype: dtype of the joined model; default: that of the routers, which is the one they were trained for.

    Raises:
        UserError: a missing or damaged router checkpoint, a base with another layer count, hidden size or weights.
    """
    directory = router_folder(routers)
    description = read_description(directory)
    if base is None:
        base, revision = description["base_model_name"], revision or description["base_model_revision"]
        if not base:
            raise UserError(f"{directory / CONFIG} names no base model; pass one with --base")
    dtype = dtype or parse_dtype(description["dtype"])
    base_config = load_config(base, revision)
    for name in ("num_hidden_layers", "hidden_size"):
        if getattr(base_config, name, None) != description[name]:
            raise UserError(
                f"{base} is not the base of the routers in {routers}: its {name} is "
                f"{getattr(base_config, name, None)}, the routers need {description[name]}; their base is "
                f"{description['base_model_name']}"
            )
    routed = load_routed(base, dtype, revision, {name: description["routers"][name] for name in ROUTERS})
    base_fingerprint = fingerprint(routed)
    if base_fingerprint != description["base_model_fingerprint"]:
        raise UserError(
            f"{base} is not the base of the routers in {routers}: its weights have the fingerprint {base_fingerprint}, "
            f"the routers were trained on {description['base_model_fingerprint']} ({description['base_model_name']}, "
            f"revision {description['base_model_revision']})"
        )
    try:
        routed.model.routers.load_state_dict(load_file(directory / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{directory / WEIGHTS} is missing, cut off or does not fit {CONFIG}: {one_line(error)}"
        ) from None
    check_finite(routed.model.routers, directory / WEIGHTS)
    routed.config.base_model_name = description["base_model_name"] or base
    routed.config.base_model_revision = revision
    routed.config.base_model_fingerprint = base_fingerprint
    routed.config.trained_num_windows = description["routers"]["num_windows"]
    return routed


def router_folder(routers: str | Path) -> Path:
    """The local folder of a router checkpoint, downloaded if it is on the Hub."""
    if Path(routers).is_dir():
        return Path(routers)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(routers), allow_patterns=[WEIGHTS, CONFIG, CHECKPOINT_MANIFEST]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{routers} is neither a folder nor a reachable repository on the Hub: {one_line(error)}"
        ) from None


def read_description(directory: Path) -> dict[str, Any]:
    """The router_config.json of a router checkpoint; UserError when it is missing or damaged."""
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory} is not a router checkpoint: it has no {CONFIG}")
    fix = "extract the routers again"
    description = read_json(path, fix)
    if description.get("format") != FORMAT:
        raise UserError(f"{path} has format {shorten(description.get('format'))}, this version reads format {FORMAT}")
    check_fields(description, DESCRIPTION, path, fix)
    if description["routers"].pop("router_domain", 0):
        raise UserError(f"{path}: the routers have domains, which this version does not know; train them again")
    check_fields(description["routers"], ROUTERS, path, fix)
    return description
