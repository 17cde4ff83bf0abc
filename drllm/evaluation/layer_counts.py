"""Layers per query, counted: block applications over all forward passes of a query, prefill included (Table 3)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from train_models.paths import EXECUTE, REPEAT, SKIP


@dataclass(frozen=True)
class Measurement:
    """The compute that one request took.

    Attributes:
        context: identifies the prompt. Its prefill is shared by all requests of a query with the same context; None
            when the request has a prefill of its own.
        path: one digit (0, 1, 2) per block.
        prefill_blocks: block applications of the prefill, which is one forward pass.
        blocks: block applications of the later forward passes.
        passes: number of later forward passes.
    """

    context: str | None
    path: str
    prefill_blocks: int
    blocks: int
    passes: int


class LayerCounts:
    """Block applications per query; a query is one document of one task."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, int], dict[tuple[str, int], Measurement]] = defaultdict(dict)

    def add(self, task: str, doc_id: int, index: tuple[str, int], measurement: Measurement) -> None:
        """Records the request `index` (kind, number) of a document; a request that runs twice counts once."""
        self._requests[task, doc_id][index] = measurement

    def requests(self) -> dict[tuple[str, int], dict[tuple[str, int], Measurement]]:
        """(task, document) -> (kind, number) -> measurement; picklable."""
        return dict(self._requests)

    def update(self, requests: dict[tuple[str, int], dict[tuple[str, int], Measurement]]) -> None:
        """Adds what `requests` of another process returned."""
        for query, measured in requests.items():
            self._requests[query].update(measured)

    def queries(self) -> Iterator[dict[str, Any]]:
        """One record per query: task, doc_id, blocks, passes (prefills included) and the distinct paths."""
        for (task, doc_id), requests in sorted(self._requests.items()):
            prefills = {request.context or index: request for index, request in requests.items()}
            yield {
                "task": task,
                "doc_id": doc_id,
                "blocks": sum(request.prefill_blocks for request in prefills.values())
                + sum(request.blocks for request in requests.values()),
                "passes": len(prefills) + sum(request.passes for request in requests.values()),
                "paths": sorted({request.path for request in requests.values()}),
            }

    def summary(self) -> dict[str, dict[str, Any]]:
        """Per task: queries, blocks per query (mean, standard error), blocks per pass, action shares per block."""
        by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for query in self.queries():
            by_task[query["task"]].append(query)
        return {task: _summary(queries) for task, queries in by_task.items()}


def _summary(queries: list[dict[str, Any]]) -> dict[str, Any]:
    blocks = torch.tensor([query["blocks"] for query in queries], dtype=torch.float64)
    passes = sum(query["passes"] for query in queries)
    # Every query has the same weight, regardless of its number of paths.
    shares = torch.stack(
        [
            torch.tensor([[int(visits) for visits in path] for path in query["paths"]])[..., None]
            .eq(torch.tensor([SKIP, EXECUTE, REPEAT]))
            .double()
            .mean(0)
            for query in queries
        ]
    ).mean(0)
    return {
        "queries": len(queries),
        "blocks": int(blocks.sum()),
        "forward_passes": passes,
        "blocks_per_query": float(blocks.mean()),
        "blocks_per_query_stderr": float(blocks.std() / len(blocks) ** 0.5) if len(blocks) > 1 else None,
        "blocks_per_pass": float(blocks.sum()) / passes,
        "share": dict(zip(("skip", "execute", "repeat"), shares.mean(0).tolist(), strict=True)),
        "share_per_block": {
            name: shares[:, action].tolist() for action, name in enumerate(("skip", "execute", "repeat"))
        },
    }
