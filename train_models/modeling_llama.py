"""Llama with one router per block.

It imports every file that it needs, also those that it needs only through another: before 5.17, transformers looks for
their imports before it has copied them.
"""

from ._releases import check_release  # noqa: F401

# isort: split
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, LlamaModel

from .cache import PathCache  # noqa: F401
from .following import FollowsPaths  # noqa: F401
from .generating import GeneratesAlongPaths  # noqa: F401
from .graphs import DecodingGraphs  # noqa: F401
from .paths import Path  # noqa: F401
from .routed import RoutedCausalLM, RoutedConfigFields, RoutedModel
from .routing import RouterBlock  # noqa: F401
from .self_check import ChecksItself  # noqa: F401
from .sharding import is_sharded  # noqa: F401


class RoutedLlamaConfig(RoutedConfigFields, LlamaConfig):
    """`LlamaConfig` and the fields of `RoutedConfigFields`."""

    model_type = "drllm_llama"
    _auto_class = "AutoConfig"


class RoutedLlamaModel(RoutedModel, LlamaModel):
    """The base model, with `routers`."""

    config_class = RoutedLlamaConfig
    _auto_class = "AutoModel"


class RoutedLlamaForCausalLM(RoutedCausalLM, LlamaForCausalLM, GenerationMixin):
    """The model with the language-model head; what checkpoints hold."""

    config_class = RoutedLlamaConfig
    base_model_type = RoutedLlamaModel
    _auto_class = "AutoModelForCausalLM"
