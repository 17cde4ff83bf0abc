"""Llama with a router a block."""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from .routed import RoutedCausalLM, RoutedConfigFields, RoutedModel


class RoutedLlamaConfig(RoutedConfigFields, LlamaConfig):
    """`LlamaConfig` and the fields of `RoutedConfigFields`."""

    model_type = "drllm_llama"
    _auto_class = "AutoConfig"


class RoutedLlamaModel(RoutedModel, LlamaModel):
    """The base model, with `routers`."""

    config_class = RoutedLlamaConfig


class RoutedLlamaForCausalLM(RoutedCausalLM, LlamaForCausalLM):
    """The model with the language-model head; what checkpoints hold."""

    config_class = RoutedLlamaConfig
    base_model_type = RoutedLlamaModel
    _auto_class = "AutoModelForCausalLM"
