"""Loading a plain checkpoint as a model that follows paths."""

from importlib import import_module

import torch
from transformers import AutoConfig, PreTrainedModel

from train_models import FAMILIES


def path_model_class(model_type: str) -> type:
    """The class for `model_type` ("llama", "qwen2", "qwen3"); ValueError, with the supported ones, for another."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}, and "
            "data_models/README.md shows how to add a family"
        )
    return getattr(import_module(f"data_models.modeling_{model_type}"), f"Path{FAMILIES[model_type]}ForCausalLM")


def load_path_model(
    name_or_path: str,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    **from_pretrained_arguments,
) -> PreTrainedModel:
    """A plain Llama, Qwen2 or Qwen3 checkpoint as a frozen model in eval mode that follows `layer_indices`.

    Args:
        name_or_path: a folder or a name on the Hub.
        dtype: dtype of the weights, as in `from_pretrained`; the same in all three steps of the pipeline.
        revision: revision of the checkpoint on the Hub.
        from_pretrained_arguments: device_map, attn_implementation, quantization_config, ...

    Raises:
        ValueError: for an unsupported family, or weights that are missing or do not fit the model.
        OSError: when the checkpoint is not found.
    """
    dtype = from_pretrained_arguments.pop("torch_dtype", dtype)  # the older name
    config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    model_class = path_model_class(config.model_type)
    model, report = model_class.from_pretrained(
        name_or_path, dtype=dtype, revision=revision, output_loading_info=True, **from_pretrained_arguments
    )
    if wrong := sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])}):
        raise ValueError(f"the checkpoint {name_or_path} does not fit its configuration: {', '.join(wrong[:3])} ...")
    return model.requires_grad_(False).eval()
