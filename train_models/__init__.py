"""Patched Hugging Face models with one RouterBlock per block: for training, evaluation and use.

This folder imports only torch and transformers, and its files only each other, because they are copied into every
checkpoint. Names are loaded on first use, so that `train_models.paths` costs the search no torch.
"""

from importlib import import_module

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # model_type: name in the classes of transformers

_HOME = {
    "RouterBlock": "routing",
    "pool_windows": "routing",
    "route": "routing",
    "PathCache": "cache",
    "retrofit": "retrofitting",
    "routed_classes": "retrofitting",
    **{
        f"Routed{family}{kind}": f"modeling_{model_type}"
        for model_type, family in FAMILIES.items()
        for kind in ("Config", "Model", "ForCausalLM")
    },
}

__all__ = ["FAMILIES", *sorted(_HOME)]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
