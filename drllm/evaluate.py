"""lm-eval's command line with the model type `drllm`, which lm-eval cannot discover by itself.

    python -m drllm.evaluate --model drllm --model_args pretrained=CHECKPOINT,dtype=bfloat16 \
        --tasks drllm_arc,drllm_dart --output_path results/

All flags are lm-eval's own. The batch size is 8 where none is given, since no result depends on it. The tasks of
`eval_tasks/` are found without `--include_path`; `--data_dir FOLDER` makes them read local files of the Hub's schema.
"""

from __future__ import annotations

import sys

from drllm.errors import main_guard
from drllm.evaluation.lm_eval_command import run_lm_eval


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Runs lm-eval with the arguments of the command line."""
    run_lm_eval(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    raise SystemExit(main())
