"""Errors that the user can fix: one sentence and an exit status instead of a traceback."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def require_packages(*names: str) -> None:
    """Ends the program with one sentence and status 2 where this interpreter lacks one of the packages `names`.

    Programs call it before they import anything else of their own.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: {sys.executable} has no {', '.join(missing)}: activate the environment with the packages of "
            "requirements.txt (source .venv/bin/activate), or call its interpreter (eval.sh: PYTHON=.venv/bin/python)",
            file=sys.stderr,
        )
        raise SystemExit(2)


class UserError(Exception):
    """An error in arguments, files or the environment; the message is one sentence that names the cause and the fix."""


def main_guard(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps the `main` of a program; use as `raise SystemExit(main())`.

    * `UserError`: prints `error: <message>` to stderr, returns 2.
    * Ctrl-C (KeyboardInterrupt): prints its message, or one sentence, to stderr, returns 130.
    * Otherwise returns what `main` returned, None as 0. Other exceptions are defects: they keep their traceback.
    """

    @functools.wraps(main)
    def guarded(*args: Any, **kwargs: Any) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
        except KeyboardInterrupt as interrupt:
            print(f"interrupted: {str(interrupt) or 'stopped by Ctrl-C'}", file=sys.stderr, flush=True)
            return 130

    return guarded
