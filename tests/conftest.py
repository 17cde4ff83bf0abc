"""Small random models of every supported family, in the shape of the real ones (grouped queries, biases, q/k norms)."""

from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.training_toys import make_base, make_labels

STOCK = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def pytest_addoption(parser):
    parser.addoption("--llm_model", metavar="FOLDER", help="checkpoint of the LLM; default: out/llm/model (make llm)")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _a_gpu_where_one_is_needed(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("needs a CUDA GPU, and torch sees none; leave out -m gpu")


@pytest.fixture(scope="session")
def stock_checkpoint(tmp_path_factory):
    """(family, **config changes) -> folder with a plain random checkpoint; made once a session for equal arguments."""
    made = {}

    def make(family: str, **changes) -> str:
        key = (family, repr(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            config_class, model_class = STOCK[family]
            torch.manual_seed(0)
            model = model_class(config_class(**(SMALL | changes)))
            with torch.no_grad():  # the stock initialisation is so small that blocks hardly matter
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.mul_(6)
            model.save_pretrained(folder)
            made[key] = str(folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def stock_model(stock_checkpoint):
    """(family, **from_pretrained arguments) -> the stock model of `stock_checkpoint(family)` in eval mode."""

    def load(family: str, changes: dict | None = None, **arguments):
        folder = stock_checkpoint(family, **(changes or {}))
        return STOCK[family][1].from_pretrained(folder, dtype=torch.float32, **arguments).eval()

    return load


@pytest.fixture(scope="session")
def base_maker():
    """`make_base`."""
    return make_base


@pytest.fixture(scope="session")
def labels_maker():
    """`make_labels`."""
    return make_labels


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A Llama of five blocks."""
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_labels(tmp_path_factory, tiny_base) -> Path:
    """24 labelled questions of two sets for `tiny_base`."""
    return make_labels(tmp_path_factory.mktemp("labels") / "data", tiny_base)
