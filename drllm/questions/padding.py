"""Batches of prompts of different lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pad_ids(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Left-pad prompts of token ids as generation does: input_ids and attention_mask [B, T]."""
    longest = max(len(token_ids) for token_ids in prompts)
    input_ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, token_ids in enumerate(prompts):
        input_ids[row, longest - len(token_ids) :] = torch.tensor(token_ids)
        attention_mask[row, longest - len(token_ids) :] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
