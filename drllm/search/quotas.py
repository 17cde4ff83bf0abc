"""How many labels of each kind every question set contributes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

from drllm.labels import SHORTER, WRONG_TO_RIGHT

KINDS = (WRONG_TO_RIGHT, SHORTER)
Cell = tuple[str, str]  # (set, kind)


def apportion(
    total: int, weights: Mapping[str, float], low: Mapping[str, float], high: Mapping[str, float]
) -> dict[str, int]:
    """Divides `total` units in proportion to `weights`, within bounds.

    Units are handed out one at a time by the Webster method, so exact proportions are met exactly and ties go to the
    first name. Where the bounds leave no choice the sum is that of `low` or of `high` instead of `total`.

    Args:
        total: units to divide.
        weights: name -> weight, at least 0.
        low: name -> fewest units.
        high: name -> most units; may be `math.inf`.
    """
    units = {name: int(low[name]) for name in weights}
    queue = [
        ((units[name] + 0.5) / weight, index, name)
        for index, (name, weight) in enumerate(weights.items())
        if weight > 0 and units[name] < high[name]
    ]
    heapq.heapify(queue)
    for _ in range(total - sum(units.values())):
        if not queue:
            break
        _, index, name = heapq.heappop(queue)
        units[name] += 1
        if units[name] < high[name]:
            heapq.heappush(queue, ((units[name] + 0.5) / weights[name], index, name))
    return units


def allocate(samples: Mapping[str, int], share: float, existing: Mapping[Cell, int]) -> dict[str, dict[str, int]]:
    """The number of labels to keep per set and kind: {set: {kind: number}}.

    In this order of importance:

    1. As many labels as exist, up to the sum of `samples`.
    2. `samples` labels of each set. What a set cannot give is divided among the others in proportion to `samples`.
    3. A share of `share` wrong-to-right labels over all sets, divided among them in proportion to their labels.

    Args:
        samples: wanted labels per set (Table 2 of the paper).
        share: target share of wrong-to-right labels over all sets, in [0, 1] (about 0.3 in Section 4 of the paper).
        existing: the number of labels that exist, for cells whose questions have all been searched.
    """
    most = {name: {kind: existing.get((name, kind), math.inf) for kind in KINDS} for name in samples}
    room = {name: sum(most[name].values()) for name in samples}
    low = {name: min(count, room[name]) for name, count in samples.items()}
    totals = apportion(sum(samples.values()), samples, low, room)
    fixes = apportion(
        round(share * sum(totals.values())),
        totals,
        {name: max(0, count - most[name][SHORTER]) for name, count in totals.items()},
        {name: min(count, most[name][WRONG_TO_RIGHT]) for name, count in totals.items()},
    )
    return {name: {WRONG_TO_RIGHT: fixes[name], SHORTER: totals[name] - fixes[name]} for name in samples}
