"""Qwen3 with one router per block.

It imports every file that it needs, also those that it needs only through another: before 5.17, transformers looks for
their imports before it has copied them.
"""

from ._releases import check_release  # noqa: F401

# isort: split
from transformers import GenerationMixin, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from .cache import PathCache  # noqa: F401
from .following import FollowsPaths  # noqa: F401
from .generating import GeneratesAlongPaths  # noqa: F401
from .graphs import DecodingGraphs  # noqa: F401
from .paths import Path  # noqa: F401
from .routed import RoutedCausalLM, RoutedConfigFields, RoutedModel
from .routing import RouterBlock  # noqa: F401
from .self_check import ChecksItself  # noqa: F401
from .sharding import is_sharded  # noqa: F401


class RoutedQwen3Config(RoutedConfigFields, Qwen3Config):
    """`Qwen3Config` and the fields of `RoutedConfigFields`."""

    model_type = "drllm_qwen3"
    _auto_class = "AutoConfig"


class RoutedQwen3Model(RoutedModel, Qwen3Model):
    """The base model, with `routers`."""

    config_class = RoutedQwen3Config
    _auto_class = "AutoModel"


class RoutedQwen3ForCausalLM(RoutedCausalLM, Qwen3ForCausalLM, GenerationMixin):
    """The model with the language-model head; what checkpoints hold."""

    config_class = RoutedQwen3Config
    base_model_type = RoutedQwen3Model
    _auto_class = "AutoModelForCausalLM"
