"""A routed model from any plain checkpoint of a supported family, in one call."""

import logging
from contextlib import contextmanager
from importlib import import_module

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from . import FAMILIES
from .routed import UNSAVED


def routed_classes(model_type: str) -> tuple[type, type]:
    """(configuration class, model class) for the plain `model_type` ("llama", "qwen2", "qwen3").

    Raises ValueError, with the supported families, for another one.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}, and "
            "train_models/README.md shows how to add a family"
        )
    module = import_module(f".modeling_{model_type}", __package__)
    return tuple(getattr(module, f"Routed{FAMILIES[model_type]}{kind}") for kind in ("Config", "ForCausalLM"))


def retrofit(
    name_or_path: str,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    seed: int = 0,
    router_config: dict | None = None,
    **from_pretrained_arguments,
) -> PreTrainedModel:
    """A routed model on the weights of a plain Llama, Qwen2 or Qwen3 checkpoint.

    The base weights are those of the checkpoint, bit for bit, and frozen; the routers are initialised from `seed`.

    Args:
        name_or_path: a folder or a name on the Hub.
        dtype: dtype of the base weights and the routers, as in `from_pretrained`.
        revision: branch, tag or commit of the checkpoint on the Hub.
        seed: seed for the routers' weights.
        router_config: fields of `RoutedConfigFields`, e.g. {"num_windows": 8, "router_width": 128}.
        from_pretrained_arguments: device_map, attn_implementation, quantization_config, ...

    Raises:
        ValueError: for an unsupported family, an already routed checkpoint, or weights that don't fit the model.
    """
    dtype = from_pretrained_arguments.pop("torch_dtype", dtype)  # the older name
    base_config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    config_class, model_class = routed_classes(base_config.model_type)
    config = routed_config(base_config, config_class, router_config or {})
    config.base_model_name = str(name_or_path)
    config.base_model_revision = revision
    with _quiet_about_new_routers():
        model, loading = model_class.from_pretrained(
            name_or_path,
            config=config,
            dtype=dtype,
            revision=revision,
            output_loading_info=True,
            **from_pretrained_arguments,
        )
    missing = sorted(key for key in loading["missing_keys"] if ".routers." not in key)
    if missing or loading["mismatched_keys"]:
        wrong = missing or sorted(str(key) for key in loading["mismatched_keys"])
        raise ValueError(f"the checkpoint {name_or_path} does not fit its configuration: {', '.join(wrong[:3])} ...")
    model.requires_grad_(False)
    model.model.routers.requires_grad_(True)
    model.model.init_routers(seed)
    model.name_or_path = f"{UNSAVED}{name_or_path}"
    return model


def routed_config(base_config: PreTrainedConfig, config_class: type, router_config: dict) -> PreTrainedConfig:
    """The configuration of the base with the fields `router_config` of `RoutedConfigFields` added."""
    fields = base_config.to_dict()
    for field in ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path"):
        fields.pop(field, None)
    return config_class(**fields, **router_config)


@contextmanager
def _quiet_about_new_routers():
    """Silences the report that the routers are newly initialised: here that is intended."""
    loading_logger = logging.getLogger("transformers.modeling_utils")

    def is_not_about_routers(record: logging.LogRecord) -> bool:
        return "routers" not in record.getMessage()

    loading_logger.addFilter(is_not_about_routers)
    try:
        yield
    finally:
        loading_logger.removeFilter(is_not_about_routers)
