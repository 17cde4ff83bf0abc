#!/usr/bin/env bash
# The checked-in figures of benchmarks/latency.py; run on a quiet machine. No argument: all that need no GPU.
#
#   benchmarks/latency.sh [static|prefill|decode|routers|compiled|llm]...
#
# MODEL is the folder of the language model of `llm`.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
MODEL=${MODEL:-models/SmolLM2-135M-Instruct}

latency() { "$PYTHON" benchmarks/latency.py "$@"; }

# What static routing costs at 12 blocks of width 256: a decoded token, and prefill.
static() {
    latency --shape small --skip 0 --batch_sizes 1,16 --threads 1,2 --rounds 40 --measure static,stock_again \
        --output results/speed/latency_static.json
}
prefill() {
    latency --shape small --skip 0 --batch_sizes 1,16 --threads 1,2 --rounds 100 --new_tokens 2 \
        --measure static,stock_again --output results/speed/latency_prefill.json
}

# What skipped blocks save in decoding, alone and in a batch; mixed paths beside their bound; grouping.
decode() {
    latency --shape d1024 --skip 2,4 --batch_sizes 1,16 --prompt_tokens 16 --new_tokens 16 --threads 1,2 \
        --measure path --output results/speed/latency_decode.json --figure results/speed/latency_decode.png
}

# The routers' share of 1,000 new tokens at width 1024. Routers and blocks both grow with the number of blocks, so four
# are enough.
routers() {
    latency --shape d1024 --blocks 4 --skip 0 --batch_sizes 1 --new_tokens 1000 --threads 1,2 --measure router \
        --output results/speed/latency_routers.json
}

compiled() {
    latency --shape small --skip 0,4 --batch_sizes 1 --rows shared --rounds 10 --threads 1,2 \
        --measure path,compiled,compiled_whole,stock_compiled --output results/speed/latency_compiled.json
}

# The paper's table on a real language model: prompt of 128 tokens, 1,000 new tokens, batch 1.
llm() {
    latency --model "$MODEL" --dtype bfloat16 --prompt_tokens 128 --new_tokens 1000 --batch_sizes 1 --skip 4 \
        --rows shared --threads 1 --measure path,router,stock_again --output results/speed/latency_llm.json
}

[ $# -gt 0 ] || set -- static prefill decode routers compiled
for recipe in "$@"; do
    case $recipe in
    static | prefill | decode | routers | compiled | llm) "$recipe" ;;
    *)
        echo "error: unknown recipe $recipe; choose from static, prefill, decode, routers, compiled, llm" >&2
        exit 2
        ;;
    esac
done
