#!/usr/bin/env bash
# What ends a search, and its length penalty: Algorithm 1, the stop of Section 4.2, and lambda 5, on the toy model. Three
# draws of labels each, one training per draw, 3,500 test questions. Half an hour on one core. Run it again to resume.
# A real LLM: runs/search_rules.sh MODEL=FOLDER_OR_NAME DATA_DIR= SAMPLES=paper LIMIT= EPOCHS=25 WARMUP=500 PROCESSES=8
source "$(dirname "$0")/settings.sh"

out=${OUT:-out/search_rules}
data=(--data_dir "${DATA_DIR-$out/questions}")
[[ ${DATA_DIR-unset} == "" ]] && data=()  # the Hub
[[ -n ${DATA_DIR-} || -n ${MODEL-} ]] || "$PYTHON" miniature/make.py questions --train 800 --test 500 --output_dir "$out/questions"
limit=(--limit "${LIMIT-240}")
[[ ${LIMIT-unset} == "" ]] && limit=()

declare -A rules=(
  [algorithm-1]="" [any-gain]="--stop_at any_gain" [lambda-5]="--lambda 5"
)
labels=() checkpoints=()
for rule in algorithm-1 any-gain lambda-5; do
  for seed in 0 1 2; do
    # shellcheck disable=SC2086  # a rule is several words
    launch data_generation.py ${MODEL:+--model "$MODEL"} "${data[@]}" "${limit[@]}" --samples "${SAMPLES:-60}" \
      --seed $seed ${rules[$rule]} --output_dir "$out/labels/$rule-$seed"
    "$PYTHON" train.py --data "$out/labels/$rule-$seed" --output_dir "$out/checkpoints" --run_name "$rule-$seed" \
      --num_epochs "${EPOCHS:-15}" --warmup_steps "${WARMUP:-50}"
    labels+=("$out/labels/$rule-$seed")
    checkpoints+=(--checkpoint "$rule=$out/checkpoints/$rule-$seed")
  done
done
"$PYTHON" -m experiments.label_choice --labels "${labels[@]}" --output "$out/results/labels.json"
"$PYTHON" -m extensions.baselines.compare "${checkpoints[@]}" "${data[@]}" --skips 2 --methods static --batch_size 128 \
  --work_dir "$out/compared" --output "$out/results/routers.json"
