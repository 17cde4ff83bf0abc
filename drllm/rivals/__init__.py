"""Rivals of the routers that train nothing, under one interface.

A `StaticRival` gives every question the same path. `fit` sees training questions only and returns the paths of
0, 1, ..., `most_skips` skipped blocks:

    BlockInfluence   the blocks that change their input least are skipped (ShortGPT, arXiv 2403.03853)
    EarlyExit        the last blocks are skipped (LayerSkip's inference, arXiv 2404.16710, on a frozen base)
    GreedySkips      blocks are skipped one after the other, each the one that costs the training questions least

`random_paths` redraws the decisions of routers regardless of the question, at the routers' own rates.
"""

from drllm.rivals.random_paths import random_paths
from drllm.rivals.static_paths import BlockInfluence, EarlyExit, GreedySkips, StaticRival

__all__ = ["BlockInfluence", "EarlyExit", "GreedySkips", "StaticRival", "random_paths"]
