"""The paths that routers decide on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from drllm.questions.padding import pad_ids
from drllm.questions.prompts import Prompt
from train_models.paths import Path


@torch.no_grad()
def routed_paths(routed: PreTrainedModel, prompts: Sequence[Prompt], batch_size: int = 64) -> list[Path]:
    """The path that the routers of `routed` decide on for each prompt, in the order of `prompts`."""
    paths: list[Path] = [()] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad_ids([prompts[i].input_ids for i in chosen], 0, routed.device)
        decided = routed.model(**batch, use_cache=False).paths.tolist()
        for i, path in zip(chosen, decided, strict=True):
            paths[i] = tuple(path)
    return paths
