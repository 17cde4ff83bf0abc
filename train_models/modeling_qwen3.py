"""Qwen3 with a router a block."""

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from .routed import RoutedCausalLM, RoutedConfigFields, RoutedModel


class RoutedQwen3Config(RoutedConfigFields, Qwen3Config):
    """`Qwen3Config` and the fields of `RoutedConfigFields`."""

    model_type = "drllm_qwen3"
    _auto_class = "AutoConfig"


class RoutedQwen3Model(RoutedModel, Qwen3Model):
    """The base model, with `routers`."""

    config_class = RoutedQwen3Config


class RoutedQwen3ForCausalLM(RoutedCausalLM, Qwen3ForCausalLM):
    """The model with the language-model head; what checkpoints hold."""

    config_class = RoutedQwen3Config
    base_model_type = RoutedQwen3Model
    _auto_class = "AutoModelForCausalLM"
