"""Which model, dtype, code and libraries produced a file: recorded in labels, checkpoints and results."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from drllm.errors import UserError
from drllm.files import check_output_file, disk_errors, write_json

ROOT = Path(__file__).resolve().parents[1]
SAMPLES_PER_TENSOR = 256
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


def dtype_on(device: torch.device, name: str) -> torch.dtype:
    """The dtype called `name`; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    return parse_dtype(("float32" if device.type == "cpu" else "bfloat16") if name == "auto" else name)


def dtype_name(dtype: str | torch.dtype) -> str:
    """The one name under which a dtype is recorded: "float32", "bfloat16" or "float16"."""
    return str(parse_dtype(dtype)).removeprefix("torch.")


@torch.no_grad()
def stored_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, values) of each parameter; tied weights appear once, under the embedding's name.

    Offloaded ones, which lie on "meta" between two forward passes, are loaded one module at a time.
    """
    seen = set()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for prefix, module in model.named_modules():
        new = {}
        for name, parameter in module.named_parameters(prefix, recurse=False):
            # Offloading replaces tied parameters by one on "meta" for each name.
            if id(parameter) not in seen and not (parameter.is_meta and name in tied):
                new[name] = parameter
            seen.add(id(parameter))
        if any(parameter.is_meta for parameter in new.values()):
            with align_module_device(module):
                for name, parameter in module.named_parameters(prefix, recurse=False):
                    if name in new:
                        yield name, parameter
        else:
            yield from new.items()


def fingerprint(model: nn.Module) -> str:
    """A hash that identifies a base model: labels made with one model must not train the routers of another.

    Covers names, shapes and up to 256 evenly spaced values of every base parameter. Routers are ignored and wrappers'
    prefixes dropped, so the stock model, the path-following one and the routed one have the same fingerprint. Values
    are rounded to bf16 first, so weights loaded as fp32 and as bf16 have the same fingerprint (fp16 too, when the
    stored weights are bf16).
    """
    digest = hashlib.sha256()
    sampled = {}
    for name, parameter in stored_parameters(model):
        if "routers" in name.split("."):
            continue
        flat = parameter.detach().reshape(-1)
        count = min(SAMPLES_PER_TENSOR, flat.numel())
        # integer arithmetic: linspace in floating point would pick other elements on another device
        where = torch.arange(count, device=flat.device) * max(flat.numel() - 1, 0) // max(count - 1, 1)
        values = flat[where].to(torch.bfloat16).to(torch.float32).cpu()
        values = torch.where(values.abs() < SMALLEST_VALUE, torch.zeros(()), values)
        name = name.removeprefix("module.").removeprefix("_orig_mod.").removeprefix("model.")
        sampled[name] = f"{name} {tuple(parameter.shape)}".encode() + values.numpy().tobytes()
    for name in sorted(sampled):
        digest.update(sampled[name])
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on (only those installed)."""
    installed = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "datasets", "lm_eval", "math-verify"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    if torch.version.cuda and torch.cuda.is_available():
        installed["cuda"] = torch.version.cuda
        installed["gpu"] = torch.cuda.get_device_name()
    return installed


def commit() -> str | None:
    """The repository's commit, "+changes" added where tracked files differ from it; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def machine() -> dict[str, Any]:
    """What a figure of speed depends on: CPU cores, threads of torch, and the GPUs (empty without one)."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu_count": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}


def command_line(program: str, argv: Sequence[str] | None = None) -> str:
    """The shell command of the running program, with paths below the repository made relative to it.

    Args:
        program: how the program is started, e.g. "python -m experiments.sweep".
        argv: its arguments; None reads `sys.argv`.
    """
    arguments = shlex.join(str(argument) for argument in (sys.argv[1:] if argv is None else argv))
    return f"{program} {arguments}".strip().replace(f"{ROOT}/", "")


def write_result(
    path: Path,
    result: Mapping[str, Any],
    *,
    command: str,
    seed: int | Sequence[int] | None,
    seconds: float,
    table: str | None = None,
) -> dict[str, Any]:
    """Write the JSON file of a result, with what is needed to reproduce it.

    Args:
        path: the file; its folder is created if needed.
        result: the figures.
        command: the command that made it, see `command_line`.
        seed: the seed or seeds; None where nothing is random.
        seconds: wall-clock time of the run.
        table: the result as Markdown; it is written beside the file, as .md with the command, and printed.

    Returns:
        What was written: `command`, `seed`, the items of `result`, `seconds`, `machine`, `versions`, `commit`.

    Raises:
        ValueError: `result` has an item of one of these names.
        UserError: the file cannot be written.
    """
    first = {"command": command, "seed": seed if seed is None or isinstance(seed, int) else list(seed)}
    last = {"seconds": round(seconds, 2), "machine": machine(), "versions": versions(), "commit": commit()}
    if taken := sorted(result.keys() & (first | last).keys()):
        raise ValueError(f"the result already has {', '.join(taken)}")
    record = {**first, **result, **last}
    path = Path(path)
    check_output_file(path, "the result file")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    if table is not None:
        with disk_errors(path):
            path.with_suffix(".md").write_text(f"{table}\n\nCommand:\n\n    {command}\n")
        print(f"{table}\n\n{path}")
    return record
