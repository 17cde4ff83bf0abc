"""Where the bundled toy model ("miniature") and its questions are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIATURE_MODEL = ROOT / "miniature" / "model"
MINIATURE_DATA = ROOT / "miniature" / "data"
