"""Files that are there whole or not at all, JSON that is read with one kind of error, and what a full disk says."""

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


@contextlib.contextmanager
def disk_errors(path: Path, safe: str = "what was finished is safe") -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into one sentence that names `path`.

    Args:
        path: what is written inside the context.
        safe: says what is not lost.

    Raises:
        UserError: in place of an OSError, or of the SafetensorError that a full disk causes.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) in full or "No space left" in str(error) or "File too large" in str(error):
            raise UserError(
                f"no room left to write {path} ({reason}); {safe}: make room and repeat the command"
            ) from error
        raise UserError(f"cannot write {path} ({reason}); {safe}") from error


def write_whole(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Writes a file so that it is there whole or not at all, also after a kill or a power failure.

    Several processes may write the same path at once; the last one wins.

    Raises:
        UserError: when the file cannot be written.
    """
    if isinstance(content, str):
        content = content.encode()
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
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
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with disk_errors(path), _removed_on_error(partial):
        save_file(dict(tensors), partial, metadata=metadata)
        partial.replace(path)


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
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {fix}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {fix}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); {fix}") from None
    if not isinstance(value, kind):
        expected = {dict: "an object", list: "a list"}.get(kind, kind.__name__)
        raise UserError(f"{path}: expected {expected}, but it holds {json.dumps(value)[:60]}; {fix}")
    return value


def is_whole(path: Path) -> bool:
    """Whether a safetensors file is there and was written to its end."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
