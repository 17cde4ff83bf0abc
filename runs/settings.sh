# Sourced by the scripts of this folder: NAME=VALUE arguments, the repository's root, and its interpreter.
#   runs/llm.sh LIMIT=60 TEST=250

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for assignment in "$@"; do
  [[ $assignment == *=* ]] || { echo "error: $assignment: expected NAME=VALUE, as in LIMIT=60" >&2; exit 2; }
  declare -g "${assignment%%=*}=${assignment#*=}"
done
PYTHON="${PYTHON:-.venv/bin/python}"
export PYTHON  # eval.sh reads it
export OMP_NUM_THREADS=1  # one thread per process: two fight for one core when a machine has few
command -v "$PYTHON" > /dev/null || { echo "error: no $PYTHON; run make .venv/.installed, or pass PYTHON=..." >&2; exit 2; }

# launch PROGRAM ...: on PROCESSES processes (default 1)
launch() {
  if [[ ${PROCESSES:-1} == 1 ]]; then "$PYTHON" "$@"; else
    if [[ $1 == -m ]]; then shift; set -- --module "$@"; fi
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$PROCESSES" "$@"
  fi
}
