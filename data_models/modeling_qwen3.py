"""Qwen3 that follows `layer_indices`."""

from transformers import Qwen3ForCausalLM, Qwen3Model

from train_models.following import CausalLMOverPaths, FollowsPaths


class PathQwen3Model(FollowsPaths, Qwen3Model):
    """The base model along one path per row."""


class PathQwen3ForCausalLM(CausalLMOverPaths, Qwen3ForCausalLM):
    """The model with the language-model head along one path per row."""

    base_model_type = PathQwen3Model
