"""The releases of transformers that this code runs on.

Each modeling file imports this one first, and it imports nothing else of this folder: so another release ends with its
one sentence and not where it first lacks a name.
"""

import logging
import re

import transformers

OLDEST, NEWEST = (5, 4), (5, 23)

logger = logging.getLogger(__name__)


def check_release(release: str) -> None:
    """Raises ImportError when `release` ("5.3.0") is older than the tested range; a newer one triggers a warning."""
    minor = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    oldest, newest = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
    if minor < OLDEST:
        raise ImportError(
            f"this model needs transformers {oldest} or newer (tested up to {newest}), but {release} is installed; run "
            f"pip install 'transformers>={oldest}'"
        )
    if minor > NEWEST:
        logger.warning(
            "the code of this model is tested with transformers %s to %s, but %s is installed; if it fails, run "
            "pip install 'transformers~=%s.0'",
            oldest,
            newest,
            release,
            newest,
        )


check_release(transformers.__version__)
