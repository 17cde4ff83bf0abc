"""The helper process of `SymbolicChecker`: compares pairs of LaTeX answers. It is started by its path."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import resource
import sys

from math_verify import LatexExtractionConfig, parse, verify


def serve(timeout_s: float, memory_bytes: int) -> None:
    """Reads one JSON pair of formulas per line, and writes "1" if they are equal, else "0"."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # LaTeX only: math-verify's other extraction hands text to sympy's parse_expr, which evaluates it.
    latex = (LatexExtractionConfig(boxed_match_priority=0),)
    soft_s = max(1, int(timeout_s) - 2)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may write where the replies go
    verify(*(parse(text, latex, parsing_timeout=soft_s) for text in ("$x+1$", "$1+x$")))  # slow the first time
    replies.write("ready\n")
    for line in sys.stdin:
        # A watchdog thread in C ends the process even if sympy hangs in C, also when the parent is gone.
        faulthandler.dump_traceback_later(timeout_s + 1, exit=True)
        try:
            gold, given = (
                parse(text, latex, fallback_mode="no_fallback", parsing_timeout=soft_s) for text in json.loads(line)
            )
            equal = bool(gold and given and verify(gold, given, timeout_seconds=soft_s))
        except (Exception, RecursionError, MemoryError):
            equal = False
        faulthandler.cancel_dump_traceback_later()
        replies.write("1\n" if equal else "0\n")


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
