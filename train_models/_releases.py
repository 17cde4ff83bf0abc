"""The releases of transformers that this code runs on.

Each modeling file imports this one first, and it imports nothing else of this folder: so another release ends with its
one sentence and not where it first lacks a name.
"""

import logging
import re

import transformers

OLDEST, NEWEST = (5, 4), (5, 24)

logger = logging.getLogger(__name__)


def _minor(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release)[:2])


def _named(bound: tuple[int, ...]) -> str:
    return ".".join(map(str, bound))


def is_tested(release: str) -> bool:
    """Whether `release` ("5.24.0") lies in the tested range."""
    return OLDEST <= _minor(release) <= NEWEST


def how_to_install() -> str:
    """The command that installs a release of the tested range."""
    return f"pip install 'transformers>={_named(OLDEST)},<{NEWEST[0]}.{NEWEST[1] + 1}'"


def check_release(release: str) -> None:
    """Raises ImportError when `release` ("5.3.0") is older than the tested range; a newer one triggers a warning."""
    if _minor(release) < OLDEST:
        raise ImportError(
            f"this model needs transformers {_named(OLDEST)} or newer (tested up to {_named(NEWEST)}), but {release} "
            f"is installed; run {how_to_install()}"
        )
    if not is_tested(release):
        logger.warning(
            "the code of this model is tested with transformers %s to %s, but %s is installed; a model checks at "
            "loading that its code works with it",
            _named(OLDEST),
            _named(NEWEST),
            release,
        )


check_release(transformers.__version__)
