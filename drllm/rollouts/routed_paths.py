"""The paths that routers decide on, and what they read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from drllm.questions.padding import pad_ids
from drllm.questions.prompts import Prompt
from train_models.paths import Path, path_to_layer_indices


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


@torch.inference_mode()
def router_windows(
    routed: PreTrainedModel,
    input_ids: Sequence[Sequence[int]],
    paths: Sequence[Path],
    batch_size: int,
    title: str | None = "hidden states of the prompts",
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the routers of `routed` read of each prompt along its path: [N, L, W, d] and bool [N, W], on the CPU.

    Args:
        input_ids: the tokens of N prompts, in any order.
        paths: one per prompt.
        batch_size: prompts per forward pass.
        title: of the progress bar; None: no bar.
    """
    config = routed.config
    windows = torch.zeros(
        len(input_ids), config.num_hidden_layers, config.num_windows, config.hidden_size, dtype=routed.dtype
    )
    mask = torch.zeros(len(input_ids), config.num_windows, dtype=torch.bool)
    order = sorted(range(len(input_ids)), key=lambda index: len(input_ids[index]))
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc=title, unit="batch", mininterval=1, disable=title is None):
        rows = order[start : start + batch_size]
        batch = pad_ids([input_ids[index] for index in rows], 0, routed.device)
        output = routed.model(
            **batch,
            layer_indices=[path_to_layer_indices(paths[index]) for index in rows],
            use_cache=False,
            output_router_inputs=True,
        )
        windows[rows], mask[rows] = output.router_inputs.cpu(), output.window_mask.cpu()
    return windows, mask
