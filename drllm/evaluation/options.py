"""The rows of log-likelihood tasks: which options lm-eval can score, and their padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drllm.errors import UserError


def padded(sequences: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask), both [rows, longest]; padding is token 0, masked."""
    longest = max(len(sequence) for sequence in sequences)
    tokens = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        columns = slice(longest - len(sequence), None) if side == "left" else slice(len(sequence))
        tokens[row, columns] = torch.tensor(sequence)
        mask[row, columns] = 1
    return tokens, mask


def check_options(requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], max_length: int) -> None:
    """Raises UserError where lm-eval's `hf` asserts, so that no answer depends on the batch size.

    Longer than the window of `max_length` tokens no option may be. One without tokens has the log-likelihood 0 where an
    option of one token follows the same context, and none elsewhere.

    Args:
        requests: (texts or None, tokens of the context, tokens of the option).
    """
    scored = {tuple(context) for _, context, option in requests if len(option) == 1}
    for texts, context, option in requests:
        if len(option) > max_length:
            shown = "a window" if texts is None else f"the option {texts[1][:40]!r}"
            raise UserError(
                f"{shown} has {len(option)} tokens, but the model reads at most {max_length}: pass a larger max_length "
                "in --model_args, or leave the question out"
            )
        if not option and tuple(context) not in scored:
            shown = "" if texts is None else f" after {texts[0][-40:]!r}"
            raise UserError(f"an option{shown} has no tokens, and so no likelihood: leave the question out")
