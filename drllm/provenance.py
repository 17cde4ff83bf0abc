"""Which model, dtype, code and libraries made a file: labels, checkpoints and results carry these."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch
from torch import nn

from drllm.errors import UserError

SAMPLES_A_TENSOR = 256
SMALLEST_VALUE = 2.0**-10  # below it fp16 runs into subnormals and rounds differently from bf16

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """The torch dtype called `name` ("bf16", "bfloat16", ...). UserError on an unknown name."""
    if isinstance(name, torch.dtype):
        return name
    try:
        return DTYPES[name.removeprefix("torch.").lower()]
    except KeyError:
        raise UserError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}") from None


def dtype_name(dtype: str | torch.dtype) -> str:
    """The one name under which a dtype is recorded: "float32", "bfloat16" or "float16"."""
    return str(parse_dtype(dtype)).removeprefix("torch.")


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A hash that tells base models apart: labels made with one model must not train the routers of another.

    Covers names, shapes and up to 256 evenly spaced values of every base parameter. The same for the stock
    model, the path-following one and the routed one (routers are left out, wrappers' prefixes dropped), and
    for weights loaded as fp32 or bf16, since values are rounded to bf16 first (fp16 agrees too when the
    stored weights are bf16).
    """
    digest = hashlib.sha256()
    parameters = {}
    for name, parameter in model.named_parameters():  # tied weights appear once, under the embedding's name
        if "routers" in name.split("."):
            continue
        parameters[name.removeprefix("module.").removeprefix("_orig_mod.").removeprefix("model.")] = parameter
    for name in sorted(parameters):
        flat = parameters[name].detach().reshape(-1)
        count = min(SAMPLES_A_TENSOR, flat.numel())
        # integer arithmetic: linspace in floating point would pick other elements on another device
        where = torch.arange(count, device=flat.device) * max(flat.numel() - 1, 0) // max(count - 1, 1)
        values = flat[where].to(torch.bfloat16).to(torch.float32).cpu()
        values = torch.where(values.abs() < SMALLEST_VALUE, torch.zeros(()), values)
        digest.update(f"{name} {tuple(parameters[name].shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on (only those installed)."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "datasets", "lm_eval", "math-verify"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.version.cuda and torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["gpu"] = torch.cuda.get_device_name()
    return found


def commit() -> str | None:
    """The repository's commit, "+changes" added where tracked files differ from it; None outside git."""

    def git(*arguments: str) -> str:
        root = Path(__file__).resolve().parent
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
