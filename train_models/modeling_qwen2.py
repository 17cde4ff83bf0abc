"""Qwen2 with a router a block."""

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from .routed import RoutedCausalLM, RoutedConfigFields, RoutedModel


class RoutedQwen2Config(RoutedConfigFields, Qwen2Config):
    """`Qwen2Config` and the fields of `RoutedConfigFields`."""

    model_type = "drllm_qwen2"
    _auto_class = "AutoConfig"


class RoutedQwen2Model(RoutedModel, Qwen2Model):
    """The base model, with `routers`."""

    config_class = RoutedQwen2Config


class RoutedQwen2ForCausalLM(RoutedCausalLM, Qwen2ForCausalLM):
    """The model with the language-model head; what checkpoints hold."""

    config_class = RoutedQwen2Config
    base_model_type = RoutedQwen2Model
    _auto_class = "AutoModelForCausalLM"
