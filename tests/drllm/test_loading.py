"""What transformers raises for checkpoints that cannot be had, as one sentence."""

import pytest

from drllm.errors import UserError
from drllm.loading import loading

GATED = (
    "You are trying to access a gated repo.\nMake sure to have access to it at "
    "https://huggingface.co/meta-llama/Llama-3.2-3B-Instruct.\n401 Client Error. (Request ID: Root=1)\n\n"
    "Cannot access gated repo for url https://huggingface.co/meta-llama/Llama-3.2-3B-Instruct/resolve/main/config.json."
)


def test_a_gated_model_keeps_its_link_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr("drllm.loading.require_hub", lambda *arguments: None)
    with pytest.raises(UserError) as caught, loading("meta-llama/Llama-3.2-3B-Instruct", "model"):
        raise OSError(GATED)
    assert str(caught.value) == (
        "cannot load the model meta-llama/Llama-3.2-3B-Instruct: it is gated: ask for access at "
        "https://huggingface.co/meta-llama/Llama-3.2-3B-Instruct, then log in with `hf auth login`, or set HF_TOKEN"
    )
