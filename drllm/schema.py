"""Checks of JSON objects that were read from files: which fields they have, and of which kind."""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from drllm.errors import UserError
from drllm.files import shorten

# A check of a JSON value, and what is expected.
Kind = tuple[Callable[[Any], bool], str]
Schema = dict[str, Kind]


def is_text(value: Any) -> bool:
    """Whether a JSON value is text that a tokenizer takes."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def is_name(value: Any) -> bool:
    """Whether a JSON value is text that is not empty."""
    return is_text(value) and bool(value)


TEXT: Kind = (is_text, "text")
NAME: Kind = (is_name, "text")
FLAG: Kind = (lambda value: isinstance(value, bool), "true or false")
COUNT: Kind = (lambda value: type(value) is int and value >= 0, "a count")
INTEGER: Kind = (lambda value: type(value) is int, "a whole number")
NUMBER: Kind = (lambda value: type(value) in (int, float), "a number")
OBJECT: Kind = (lambda value: isinstance(value, dict), "an object")
LIST: Kind = (lambda value: isinstance(value, list), "a list")


def or_null(kind: Kind) -> Kind:
    """`kind`, or null."""
    return lambda value: value is None or kind[0](value), f"{kind[1]} or null"


def each(kind: Kind, of: type = dict) -> Kind:
    """An object, or a list, whose values are of `kind`."""

    def is_valid(value: Any) -> bool:
        return isinstance(value, of) and all(map(kind[0], value.values() if of is dict else value))

    return is_valid, f"{'an object' if of is dict else 'a list'}, each value {kind[1]}"


def check_fields(
    record: dict[str, Any],
    schema: Schema,
    where: Path | str,
    fix: str = "",
    may_lack: Container[str] = (),
    word: str = "field",
) -> None:
    """Checks the fields of `record` that `schema` names; other fields are not looked at.

    Args:
        where: file, and line if it has several records.
        fix: what to do, the end of the sentence.
        may_lack: fields that may be missing.
        word: word for a field.

    Raises:
        UserError: a field is missing, or is not as expected.
    """
    end = f"; {fix}" if fix else ""
    for name, (is_valid, expected) in schema.items():
        if name in record:
            if not is_valid(record[name]):
                raise UserError(f"{where}: '{name}' is {shorten(record[name], 80)}, expected {expected}{end}")
        elif name not in may_lack:
            raise UserError(f"{where}: no {word} '{name}'{end}")
