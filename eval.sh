#!/usr/bin/env bash
# Step 3: checkpoint -> lm-eval results without and with routing, the table that compares them, and figures.
#
#   ./eval.sh checkpoints/drllm                                  # in-domain tasks, questions from the Hub
#   ./eval.sh checkpoints/drllm --data_dir miniature/data        # local files of the Hub's schema
#   ./eval.sh checkpoints/drllm --tasks mmlu,gsm8k --batch_size 16
#   ./eval.sh --help
#
# Run again, it continues. PYTHON names the interpreter (default: python3 on the PATH).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python3}"
command -v "$python" > /dev/null || { echo "error: no $python here; set PYTHON to your interpreter" >&2; exit 2; }
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
"$python" -c 'from drllm.errors import require_packages as r; r("torch", "transformers", "accelerate", "lm_eval", "math_verify")'
exec "$python" -m drllm.evaluation.eval_sh "$@"
