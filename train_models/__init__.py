"""Patched Hugging Face models with a RouterBlock per block: for training, evaluation and use.

This folder imports only torch and transformers, and its files only each other, because they are copied into every
checkpoint. Names are loaded on first use, so that `train_models.paths` costs the search no torch.
"""

from importlib import import_module

_HOME = {
    "RouterBlock": "routing",
    "pool_windows": "routing",
    "route": "routing",
    "PathCache": "cache",
    "retrofit": "retrofitting",
    "routed_classes": "retrofitting",
    **{
        f"Routed{family}{kind}": f"modeling_{family.lower()}"
        for family in ("Llama", "Qwen2", "Qwen3")
        for kind in ("Config", "Model", "ForCausalLM")
    },
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
