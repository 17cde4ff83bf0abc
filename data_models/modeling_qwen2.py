"""Qwen2 that follows `layer_indices`."""

from transformers import Qwen2ForCausalLM, Qwen2Model

from train_models.following import CausalLMOverPaths, FollowsPaths


class PathQwen2Model(FollowsPaths, Qwen2Model):
    """The base model along one path per row."""


class PathQwen2ForCausalLM(CausalLMOverPaths, Qwen2ForCausalLM):
    """The model with the language-model head along one path per row."""

    base_model_type = PathQwen2Model
