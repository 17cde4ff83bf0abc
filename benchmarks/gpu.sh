#!/usr/bin/env bash
# All figures of one GPU, in 18 minutes: random weights at the paper's shapes, prompts as long as those of ARC and DART.
#
#   benchmarks/gpu.sh OUTPUT_FOLDER [correctness|search|decode|training|evaluation]...
#
# Each stage can be run alone and writes its JSON into OUTPUT_FOLDER as soon as it has a figure; what is there when its
# time is up stays. At the end a table (benchmarks/gpu_table.py). No network. SHAPE=llama-3.1-8b for the other shape,
# SECONDS_IN_ALL for another limit; DEVICE=cpu and DTYPE=float32 show that it runs, and no speed.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,8s/^# \?//p' "$0" >&2; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
SHAPE=${SHAPE:-llama-3.2-3b}
DEVICE=${DEVICE:-cuda}
DTYPE=${DTYPE:-bfloat16}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-1080}
MODES=stock,eager,graphs
! command -v cc >/dev/null || MODES+=,compiled # torch.compile needs a C compiler
MOST=540 # seconds of one stage
declare -A SHARE=([correctness]=90 [search]=320 [decode]=270 [training]=210 [evaluation]=190)
SCRATCH=$(mktemp -d "$OUT/scratch.XXXXXX")
trap 'rm -rf "$SCRATCH"' EXIT
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Arguments after the default ones of each stage; the tests make everything small with them.
read -ra SEARCH_ARGUMENTS <<<"${SEARCH_ARGUMENTS:-}"
read -ra DECODE_ARGUMENTS <<<"${DECODE_ARGUMENTS:-}"
read -ra TRAINING_ARGUMENTS <<<"${TRAINING_ARGUMENTS:-}"
read -ra EVALUATION_ARGUMENTS <<<"${EVALUATION_ARGUMENTS:-}"

correctness() { # only the files that need a card: others may need packages that are not there
    mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
    "${LIMITED[@]}" "$PYTHON" -m pytest -p no:cacheprovider -m gpu --junitxml "$OUT/correctness.xml" "${files[@]}"
}
search() {
    "${LIMITED[@]}" "$PYTHON" benchmarks/search.py speed --shape "$SHAPE" --dtype "$DTYPE" --num_simulations 6 \
        --published_questions 7 --output_dir "$OUT" "${SEARCH_ARGUMENTS[@]}"
}
decode() {
    "${LIMITED[@]}" "$PYTHON" benchmarks/decode.py --shape "$SHAPE" --device "$DEVICE" --dtype "$DTYPE" \
        --modes "$MODES" --output "$OUT/decode.json" "${DECODE_ARGUMENTS[@]}"
}
training() {
    "${LIMITED[@]}" "$PYTHON" benchmarks/training_memory.py --shape "$SHAPE" --dtype "$DTYPE" --scratch "$SCRATCH" \
        --output "$OUT/training.json" "${TRAINING_ARGUMENTS[@]}"
}
evaluation() {
    "${LIMITED[@]}" "$PYTHON" benchmarks/evaluation.py --shape "$SHAPE" --device "$DEVICE" --dtype "$DTYPE" \
        --questions 64 --batch_sizes 1,16,64 --new_tokens 256 --pairs 3 --output "$OUT/evaluation.json" \
        "${EVALUATION_ARGUMENTS[@]}"
}

[ $# -gt 0 ] || set -- correctness search decode training evaluation
for stage in "$@"; do
    [ -n "${SHARE[$stage]:-}" ] || {
        echo "error: unknown stage $stage; choose from correctness, search, decode, training, evaluation" >&2
        exit 2
    }
done
failed=0
while [ $# -gt 0 ]; do
    stage=$1
    shift
    later=0
    for other in "$@"; do later=$((later + SHARE[$other])); done
    # What earlier stages left over goes to this one.
    limit=$((SECONDS_IN_ALL - SECONDS - later))
    limit=$((limit > MOST ? MOST : limit < 1 ? 1 : limit))
    LIMITED=(timeout --kill-after=10 "$limit")
    echo "== $stage, at most $limit s"
    status=0
    "$stage" >"$OUT/$stage.log" 2>&1 || status=$?
    [ "$status" = 0 ] || { failed=1; echo "$stage ended with status $status (124: its time was up), see $OUT/$stage.log"; }
    tail -n 12 "$OUT/$stage.log"
done
"$PYTHON" benchmarks/gpu_table.py "$OUT"
exit $failed
