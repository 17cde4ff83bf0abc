"""Rivals of the routers, on the same frozen base, under one interface (`interface.Rival`).

    short_gpt()    one path for all: the blocks that change their input least are skipped (arXiv 2403.03853)
    layer_skip()   one path for all: the last blocks are skipped (LayerSkip's inference, arXiv 2404.16710)
    MindSkip()     a linear router per block decides once per prompt (Router-Tuning, arXiv 2410.13184)
    FlexiDepth()   a router and an adapter per block decide per token (arXiv 2503.23798)
    CoLa()         search with the gold answer of the test question (arXiv 2507.07996): a ceiling, not a rival

`experiments.rivals` compares them under one budget. `random_paths` redraws the decisions of routers regardless of the
question, at the routers' own rates.

A `StaticRival` chooses the paths of 0, 1, ..., `most_skips` skipped blocks: `BlockInfluence`, `EarlyExit`, and
`GreedySkips`, which skips blocks one after the other, each the one that costs the training questions least.
"""

from drllm.rivals.benches import BENCHES, GenerationBench, LikelihoodBench
from drllm.rivals.cola import CoLa
from drllm.rivals.fixed_paths import layer_skip, short_gpt
from drllm.rivals.flexidepth import FlexiDepth
from drllm.rivals.gated_blocks import GateTraining
from drllm.rivals.interface import Bench, Cost, FittedRival, Rival, fit_once
from drllm.rivals.mindskip import MindSkip
from drllm.rivals.random_paths import random_paths
from drllm.rivals.static_paths import BlockInfluence, EarlyExit, GreedySkips, StaticRival

__all__ = [
    "BENCHES",
    "Bench",
    "BlockInfluence",
    "CoLa",
    "Cost",
    "EarlyExit",
    "FittedRival",
    "FlexiDepth",
    "GateTraining",
    "GenerationBench",
    "GreedySkips",
    "LikelihoodBench",
    "MindSkip",
    "Rival",
    "StaticRival",
    "fit_once",
    "layer_skip",
    "random_paths",
    "short_gpt",
]
