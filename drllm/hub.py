"""Whether models on the Hugging Face Hub can be had, found out in seconds."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from drllm.errors import UserError

TIMEOUT = 5.0


def require_hub(name_or_path: str | Path, revision: str | None = None, timeout: float = TIMEOUT) -> None:
    """Checks that a model is a local folder, is in the Hub's cache, or that the Hub answers.

    Without a network transformers retries each file of a model for about 25 s before it says so.

    Args:
        name_or_path: a folder or a name on the Hub.
        revision: revision of the model on the Hub.
        timeout: seconds that the one request may take.

    Raises:
        UserError: the model is not here and the Hub cannot be reached.
    """
    if Path(name_or_path).exists() or constants.HF_HUB_OFFLINE:
        return
    try:
        if isinstance(try_to_load_from_cache(str(name_or_path), "config.json", revision=revision), str):
            return
    except HFValidationError:  # not a name of the Hub: loading says so at once
        return
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=timeout).close()
    except urllib.error.HTTPError:
        return  # an answer
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # an answer, though one of a proxy
            return
        raise UserError(
            f"cannot load the model {name_or_path}: there is no such folder, it is not in the cache, and the Hub "
            f"({constants.ENDPOINT}) cannot be reached ({reason}); pass a local folder, or check the connection"
        ) from None
