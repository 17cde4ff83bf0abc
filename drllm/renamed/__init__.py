"""Former names of programs: `python -m drllm.NAME` says the new name and ends with an error, for one release.

This folder is part of the path of the package `drllm` (see drllm/__init__.py), so that its modules are found there.
"""

from __future__ import annotations

import sys

NEW_NAMES = {
    "ablations": "python -m experiments.ablations",
    "backbones": "python -m experiments.paper_backbones",
    "claim": "python -m experiments.compare_methods",
    "comparison": "./eval.sh",
    "effects": "python -m experiments.group_paths",
    "figures": "python -m experiments.paper_figures",
    "look": "python -m experiments.inspect_prompt",
    "sweep": "python -m experiments.sweep",
    "tables": "python -m experiments.paper_tables",
}


def refuse(module: str) -> None:
    """Prints the new name of the program `module`, e.g. "drllm.claim", and exits with status 2."""
    new = NEW_NAMES[module.rpartition(".")[2]]
    print(f"error: python -m {module} is now {new}", file=sys.stderr)
    raise SystemExit(2)
