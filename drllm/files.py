"""Atomic writes, JSON with one kind of error, and checks of output paths."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from drllm.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The last three are what torch.save says.
DISK_FULL_MESSAGES = (
    "No space left",
    "File too large",
    "quota exceeded",
    "PytorchStreamWriter failed",
    "unexpected pos",
    "iostream error",
)


@contextlib.contextmanager
def disk_errors(path: Path, safe: str = "finished work is kept") -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into one sentence that names `path`.

    Args:
        path: the file or folder that is written inside the context.
        safe: what is not lost.

    Raises:
        UserError: in place of an OSError, of the SafetensorError that a full disk causes, or of the RuntimeError of
            `torch.save` on a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        is_full = getattr(error, "errno", None) in DISK_FULL or any(m in str(error) for m in DISK_FULL_MESSAGES)
        if isinstance(error, RuntimeError) and not is_full:
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        if is_full:
            raise UserError(
                f"no space left to write {path} ({reason}); {safe}: free some space and run the same command to resume"
            ) from error
        raise UserError(f"cannot write {path} ({reason}); {safe}") from error


def write_whole(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Writes a file atomically: after a kill or a power failure it is either complete or absent.

    Several processes may write the same path at once; the last one wins.

    Raises:
        UserError: the file cannot be written.
    """
    if isinstance(content, str):
        content = content.encode()
    partial = _partial(path)
    with disk_errors(path), _removed_on_error(partial):
        with partial.open("wb") as file:
            for part in [content] if isinstance(content, bytes) else content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of `value` as indented JSON."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """`write_whole` of a safetensors file."""
    partial = _partial(path)
    with disk_errors(path), _removed_on_error(partial):
        save_file(dict(tensors), partial, metadata=metadata)
        partial.replace(path)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """`write_whole` of a file for `torch.load(path, weights_only=True)`."""
    partial = _partial(path)
    with disk_errors(path), _removed_on_error(partial):
        torch.save(state, partial)
        partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


@contextlib.contextmanager
def _removed_on_error(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def read_json(path: Path, fix: str, kind: type = dict) -> Any:
    """The JSON value in a file.

    Args:
        path: the file.
        fix: what to do when it is missing or damaged, the end of the sentence.
        kind: the type that the value must have.

    Raises:
        UserError: the file is missing, unreadable, not JSON, or holds a value of another type.
    """
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist; {fix}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {fix}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); {fix}") from None
    if not isinstance(value, kind):
        names: dict[type, str] = {dict: "an object", list: "a list"}
        expected = names.get(kind, kind.__name__)
        raise UserError(f"{path}: expected {expected}, found {shorten(value)}; {fix}")
    return value


def shorten(value: Any, length: int = 60) -> str:
    """The start of a JSON value, for messages."""
    try:
        text = json.dumps(value)
    except (RecursionError, TypeError, ValueError):
        text = type(value).__name__
    return text if len(text) <= length else text[:length] + "..."


def is_whole(path: Path) -> bool:
    """Whether a safetensors file exists and is complete."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def beside(folder: Path, suffix: str) -> Path:
    """The folder NAME-SUFFIX beside `folder`, NAME being its own name."""
    return folder.parent / f"{folder.resolve().name}-{suffix}"  # "." has no name of its own


def check_output_folder(path: Path | str, argument: str) -> None:
    """Checks that a folder can be created, or written to, at `path`. Creates nothing.

    Call it before any work whose results go there.

    Args:
        path: the folder.
        argument: the command-line argument that names it, for the message.

    Raises:
        UserError: `path` or one of its parents is a file, or the folder is not writable.
    """
    path = Path(path)
    existing = path.absolute()
    while not _exists(existing):
        existing = existing.parent
    if not existing.is_dir():
        which = "is a file" if existing == path.absolute() else f"is below the file {existing}"
        raise UserError(f"{argument} {path} {which}; pass a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{argument} {path}: no permission to write in {existing}; pass another folder")


def check_output_file(path: Path | str, argument: str) -> None:
    """Checks that a file can be created, or replaced, at `path`. Creates nothing.

    Raises:
        UserError: `path` is a folder, is below a file, or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{argument} {path} is a folder; pass a file")
    check_output_folder(path.parent, argument)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a parent that may not be searched, a name that is too long
        return False
