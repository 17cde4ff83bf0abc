#!/usr/bin/env bash
# A pretrained LLM, SmolLM2-135M-Instruct, on real questions by log-likelihood: routers as published, routers on labels of
# groups, lm-eval on both, and the table of both beside static paths. An hour on two cores. Run it again to resume.
#
#   runs/llm.sh MODEL=FOLDER_OR_NAME DATA_DIR=FOLDER LIMIT=60 TEST=250 PROCESSES=2
#
# MODEL: default the weights of requirements-llm.txt (make out/llm/model). DATA_DIR: default the Hub. LIMIT, TEST: training
# and test questions per set.
source "$(dirname "$0")/settings.sh"

out=out/llm
model="${MODEL:-$out/model}"
limit="${LIMIT:-60}"
test_questions="${TEST:-250}"
PROCESSES="${PROCESSES:-2}"
sets=arc,openbookqa,commonsense
data=(${DATA_DIR:+--data_dir "$DATA_DIR"})
common=(--reward likelihood --model "$model" "${data[@]}" --dataset $sets --unlike $sets --batch_size 8)

launch data_generation.py "${common[@]}" --limit "$limit" --samples "$limit" --concurrency 32 --output_dir $out/labels
launch -m extensions.groups.search "${common[@]}" --limit "$limit" --groups collection --output_dir $out/group_labels
shared=()
for kind in labels group_labels; do
  "$PYTHON" train.py --data $out/$kind --model_id "$model" --output_dir $out/checkpoints --run_name $kind --warmup_steps 100
  ./eval.sh $out/checkpoints/$kind "${data[@]}" --limit "$test_questions" --num_processes "$PROCESSES" --batch_size 8 \
    --output_dir $out/results/$kind "${shared[@]}"
  shared=(--base_results $out/results/labels)
done
launch -m extensions.baselines.compare --checkpoint "as published=$out/checkpoints/labels" \
  --checkpoint "labels of groups=$out/checkpoints/group_labels" "${data[@]}" --dataset $sets --unlike $sets --skips 2 \
  --methods static,shortgpt,layerskip --train_questions "$limit" --test_questions "$test_questions" --batch_size 8 \
  --work_dir $out/compared --output $out/results/compare.json
