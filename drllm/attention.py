"""Attention kernels for work whose shapes change at every step: rollouts, pooled windows, evaluation.

On Hopper cards torch prefers cuDNN's attention, which builds a plan for each new shape: 3.5 ms of CPU time per call on
an H200, four fifths of a search. A search changes its shapes at every step (rows per block, length of the cache), so
the plans never pay. Flash, memory-efficient and plain attention need none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.nn.attention import SDPBackend, sdpa_kernel

WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextlib.contextmanager
def kernels_without_plans() -> Iterator[None]:
    """Within it, torch's scaled_dot_product_attention chooses among kernels that need no plan per shape.

    What the process had allowed holds again afterwards. Also a decorator.
    """
    with sdpa_kernel(WITHOUT_PLANS):
        yield
