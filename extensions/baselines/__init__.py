"""Other methods beside the routers, on the same frozen base, under one interface (`interface.Baseline`).

    GreedySkips()     one path for all: blocks skipped one after the other, each the one that costs the reward least
    BlockInfluence()  one path for all: blocks that change their input least are skipped (ShortGPT, arXiv 2403.03853)
    EarlyExit()       one path for all: the last blocks are skipped (LayerSkip's inference, arXiv 2404.16710)
    MindSkip()        a linear router per block decides once per prompt (Router-Tuning, arXiv 2410.13184)
    FlexiDepth()      a router and an adapter per block decide per token (arXiv 2503.23798)
    ceiling           search with the gold answer of the test question (CoLa, arXiv 2507.07996): no method, a bound

`compare` is the program; `bench.Bench` holds the questions and every score.
"""
