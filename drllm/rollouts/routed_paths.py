"""The paths that routers decide on, and what they read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from drllm.attention import kernels_without_plans
from drllm.labels import Example
from drllm.questions.padding import pad_ids
from drllm.questions.prompts import Prompt
from train_models.paths import Path, path_to_layer_indices

# Tokens of a batch that pools windows, padding included: the three intermediate states of an MLP 8,192 wide then take
# 0.4 GB in 16 bits.
MOST_TOKENS = 8192


@kernels_without_plans()
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


@torch.no_grad()
def windows_in_batches(
    routed: PreTrainedModel, examples: Sequence[Example], batch_size: int, pad_token_id: int = 0
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """What the routers of `routed` read of each prompt along its path, batch by batch, shortest prompts first.

    A batch has `batch_size` prompts, or fewer where they are long.

    Yields:
        The places of B examples, windows [B, L, W, d] in the model's dtype and the mask of valid windows, bool [B, W],
        on the model's device; routers that read embeddings have the same windows in every layer.
    """
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].token_ids))
    while order:
        rows = min(batch_size, len(order))
        while rows > 1 and rows * len(examples[order[rows - 1]].token_ids) > MOST_TOKENS:
            rows -= 1
        places, order = order[:rows], order[rows:]
        with kernels_without_plans():
            output = routed.model(
                **pad_ids([examples[place].token_ids for place in places], pad_token_id, routed.device),
                layer_indices=[path_to_layer_indices(examples[place].path) for place in places],
                use_cache=False,
                output_router_inputs=True,
            )
        yield places, output.router_inputs, output.window_mask


def router_windows(
    routed: PreTrainedModel,
    examples: Sequence[Example],
    batch_size: int,
    title: str | None = "hidden states of the prompts",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`windows_in_batches` as a whole, in the order of `examples`: [N, L, W, d] and bool [N, W], on the CPU.

    `title` names the progress bar; None: no bar.
    """
    config = routed.config
    shape = (len(examples), config.num_hidden_layers, config.num_windows, config.hidden_size)
    windows, mask = torch.zeros(shape, dtype=routed.dtype), torch.zeros(len(examples), shape[2], dtype=torch.bool)
    with tqdm(total=len(examples), desc=title, unit="prompt", mininterval=1, disable=title is None) as progress:
        for places, of_batch, valid in windows_in_batches(routed, examples, batch_size):
            windows[places], mask[places] = of_batch.cpu(), valid.cpu()
            progress.update(len(places))
    return windows, mask
