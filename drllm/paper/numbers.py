"""The paper's numbers, from `paper.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAPER_FILE = Path(__file__).with_name("paper.json")

# A number of a table: value; delta, as printed in parentheses beside it; std, behind ±; as_printed, e.g. "2.25k".
Cell = dict[str, Any]


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        caption: the paper's.
        columns: names in the paper's order.
        rows: row -> column -> cell, or row -> "base" and "+ router" -> column -> cell (Tables 3 and 4).
        note: what was derived from the numbers, and where they contradict each other.
    """

    caption: str
    columns: list[str]
    rows: dict[str, Any]
    note: str


def paper_table(number: int) -> PaperTable:
    """Table `number` of the paper, 2 to 6."""
    return PaperTable(**json.loads(PAPER_FILE.read_text())["tables"][str(number)])


def paper_models() -> list[dict[str, Any]]:
    """The six backbones: paper (name in Table 3), table4 (name in Table 4), id, blocks, hidden_size, parameters."""
    return json.loads(PAPER_FILE.read_text())["models"]


def paper_sets() -> dict[str, str]:
    """Set name -> the paper's name: "arc_easy" -> "ARC-E"."""
    return json.loads(PAPER_FILE.read_text())["sets"]


def printed(cell: Cell) -> str:
    """A number with what stands beside it in the paper, e.g. "74.5 (+1.0)" or "60.5 ± 0.39"."""
    text = cell.get("as_printed", str(cell["value"]))
    text += f" ± {cell['std']:.2f}" if "std" in cell else ""
    return text + (f" ({cell['delta']:+})" if "delta" in cell else "")
