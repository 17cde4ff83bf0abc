"""Llama that follows `layer_indices`."""

from transformers import LlamaForCausalLM, LlamaModel

from train_models.following import CausalLMOverPaths, FollowsPaths


class PathLlamaModel(FollowsPaths, LlamaModel):
    """The base model along one path per row."""


class PathLlamaForCausalLM(CausalLMOverPaths, LlamaForCausalLM):
    """The model with the language-model head along one path per row."""

    base_model_type = PathLlamaModel
