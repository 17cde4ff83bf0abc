"""Loading of models: what may go wrong, as one sentence each."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from drllm.errors import UserError
from drllm.files import read_json
from drllm.hub import require_hub

# What transformers raises for a damaged configuration, depending on the field.
LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)


def check_finite(model: nn.Module, name_or_path: str | Path) -> None:
    """Raises UserError, with the tensor's name, when a weight or buffer of `model` is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or not tensor.is_floating_point():
            continue
        if tensor.numel() == 0:
            continue
        tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # reductions are not defined for fp8
        # The extremes rather than isfinite: no mask as large as the model. NaN propagates.
        if not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
            raise UserError(f"{name_or_path}: the weight {name} holds NaN or infinity; use another checkpoint")


def check_complete(report: Mapping[str, Any], name_or_path: str | Path) -> None:
    """Raises UserError, with a tensor's name, when a checkpoint lacks weights or has some of another shape.

    Args:
        report: what `from_pretrained(..., output_loading_info=True)` returns beside the model.
        name_or_path: name or folder of the checkpoint, for the sentence.
    """
    if incomplete := sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])}):
        raise UserError(
            f"cannot load the checkpoint {name_or_path}: {len(incomplete)} weights are missing or have another shape, "
            f"the first is {incomplete[0]}"
        )


def check_json_files(folder: str | Path) -> None:
    """Raises UserError, with the file's name, when a JSON file of a local checkpoint is damaged; else transformers
    raises what it stumbles over."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        if (path := Path(folder, name)).is_file():
            read_json(path, "pass an undamaged checkpoint")


@contextlib.contextmanager
def loading(name_or_path: str | Path, kind: str, revision: str | None = None) -> Iterator[None]:
    """Turns what transformers raises for a missing or damaged checkpoint into one sentence.

    Args:
        name_or_path: a folder or a name on the Hub, which is asked for once and not with transformers' retries.
        kind: kind of what is loaded, for the sentence.
        revision: revision of a model on the Hub.

    Raises:
        UserError: in place of any of `LOADING_ERRORS`, or because the model is not there.
    """
    name = str(name_or_path)
    # Hub names have the form NAME or USER/NAME.
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).exists():
        raise UserError(f"cannot load the {kind} {name}: the folder does not exist")
    if Path(name).is_file():
        raise UserError(f"cannot load the {kind} {name}: it is a file; pass a folder")
    require_hub(name, revision)
    check_json_files(name)
    try:
        yield
    except LOADING_ERRORS as error:
        raise UserError(f"cannot load the {kind} {name}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """The reason in an exception's message, without the lines of advice below it; what to do about a gated model."""
    if "gated repo" in str(error) and (link := re.search(r"https?://\S*\w", str(error))):
        return f"it is gated: ask for access at {link[0]}, then log in with `hf auth login`, or set HF_TOKEN"
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # "Validation error for field 'x':" is followed by the reason.
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"
