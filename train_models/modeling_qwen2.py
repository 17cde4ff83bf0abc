"""Qwen2 with one router per block.

It imports every file that it needs, also those that it needs only through another: before 5.17, transformers looks for
their imports before it has copied them.
"""

from ._releases import check_release  # noqa: F401

# isort: split
from transformers import GenerationMixin, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from .cache import PathCache  # noqa: F401
from .following import FollowsPaths  # noqa: F401
from .generating import GeneratesAlongPaths  # noqa: F401
from .graphs import DecodingGraphs  # noqa: F401
from .paths import Path  # noqa: F401
from .routed import RoutedCausalLM, RoutedConfigFields, RoutedModel
from .routing import RouterBlock  # noqa: F401
from .self_check import ChecksItself  # noqa: F401
from .sharding import is_sharded  # noqa: F401


class RoutedQwen2Config(RoutedConfigFields, Qwen2Config):
    """`Qwen2Config` and the fields of `RoutedConfigFields`."""

    model_type = "drllm_qwen2"
    _auto_class = "AutoConfig"


class RoutedQwen2Model(RoutedModel, Qwen2Model):
    """The base model, with `routers`."""

    config_class = RoutedQwen2Config
    _auto_class = "AutoModel"


class RoutedQwen2ForCausalLM(RoutedCausalLM, Qwen2ForCausalLM, GenerationMixin):
    """The model with the language-model head; what checkpoints hold."""

    config_class = RoutedQwen2Config
    base_model_type = RoutedQwen2Model
    _auto_class = "AutoModelForCausalLM"
