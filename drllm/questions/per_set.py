"""Command-line values that are given per question set."""

from __future__ import annotations

from collections.abc import Sequence

from drllm.errors import UserError
from drllm.questions.sets import GROUPS


def numbers_per_set(option: str, setting: str, sets: Sequence[str], default: str) -> dict[str, int]:
    """The numbers that `setting` gives to some or all of `sets`.

    Args:
        option: the command-line option, for messages.
        setting: the word `default`, which gives none; one number for all sets; or "name=number,..." with names of sets
            and groups, where the number of a set has priority over that of its group.
        sets: the sets of the run.
        default: the word for the defaults.

    Raises:
        UserError: another form, a number below 1, or a set outside `sets`.
    """
    if setting == default:
        return {}
    try:
        if "=" in setting:
            pairs = [part.split("=") for part in setting.split(",")]
            given = {name.strip(): int(number) for name, number in pairs}
        else:
            given = dict.fromkeys(sets, int(setting))
    except ValueError:
        raise UserError(f"{option} {setting}: expected {default}, a number, or name=number,name=number") from None
    for group in GROUPS.keys() & given.keys():
        number = given.pop(group)
        given = {name: number for name in GROUPS[group] if name in sets} | given
    if not given.keys() <= set(sets) or min(given.values(), default=0) < 1:
        raise UserError(f"{option} {setting}: expected numbers of at least 1 for sets of --dataset: {', '.join(sets)}")
    return given
