"""Ways to damage a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _nan(path: Path) -> None:
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name].view(-1)[-1] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


def _lacking(path: Path) -> None:
    weights = load_file(path)
    del weights[next(name for name in sorted(weights) if "layers" in name)]
    save_file(weights, path, metadata={"format": "pt"})


def _smaller(path: Path) -> None:
    weights = load_file(path)
    name = next(name for name in sorted(weights) if "layers" in name and weights[name].ndim == 2)
    weights[name] = torch.zeros(2, 2, dtype=weights[name].dtype)
    save_file(weights, path, metadata={"format": "pt"})


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": _cut,
    "binary": lambda path: path.write_bytes(bytes(range(128, 256))),
    "list": lambda path: path.write_text("[1, 2]"),
    "number": lambda path: path.write_text("7"),
    "object": lambda path: path.write_text("{}"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "folder": _folder,
    "nan": _nan,
    "lacking": _lacking,
    "smaller": _smaller,
}


def damage(path: Path, how: str) -> None:
    """Damages a file.

    Args:
        path: the file.
        how: a key of `DAMAGES`; "FIELD=JSON" or "-FIELD" changes or removes a field of a JSON object, "a.b" inside of
            another, of the first object in a .jsonl file.
    """
    if how in DAMAGES:
        DAMAGES[how](path)
        return
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    value = json.loads(lines[0])
    name, _, new = how.removeprefix("-").partition("=")
    *parents, name = name.split(".")
    inner = value
    for parent in parents:
        inner = inner[parent]
    if how.startswith("-"):
        del inner[name]
    else:
        inner[name] = json.loads(new)
    path.write_text("\n".join([json.dumps(value), *lines[1:]]) + "\n")


def damaged_copy(source: Path, target: Path, file: str, how: str) -> Path:
    """A copy of the folder `source` with one file damaged."""
    shutil.copytree(source, target)
    damage(target / file, how)
    return target
