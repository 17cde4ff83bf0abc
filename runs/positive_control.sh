#!/usr/bin/env bash
# The positive control: a base with a known best path per kind of question; how much of its gain each method recovers.
# Forty minutes on one core; results/positive_control has the table. Run it again to resume.
source "$(dirname "$0")/settings.sh"

out=out/positive_control
control=miniature/positive_control
"$PYTHON" miniature/make.py questions --train 1900 --test 1900 --output_dir $out/questions
"$PYTHON" data_generation.py --model $control/model --data_dir $out/questions --samples 150 --limit 300 --output_dir $out/labels
"$PYTHON" -m extensions.groups.search --model $control/model --data_dir $out/questions --limit 300 \
  --output_dir $out/group_labels
checkpoints=()
for seed in 0 1 2; do
  for kind in labels group_labels; do
    "$PYTHON" train.py --data $out/$kind --output_dir $out/checkpoints --run_name $kind-$seed --seed $seed \
      --num_epochs 15 --warmup_steps 50
  done
  # The paper's beta, which is far from its class weights at so few labels.
  "$PYTHON" train.py --data $out/labels --output_dir $out/checkpoints --run_name beta-$seed --seed $seed \
    --num_epochs 15 --warmup_steps 50 --beta 0.999
  checkpoints+=(--checkpoint "as published=$out/checkpoints/labels-$seed")
  checkpoints+=(--checkpoint "as published, beta 0.999=$out/checkpoints/beta-$seed")
  checkpoints+=(--checkpoint "labels of groups=$out/checkpoints/group_labels-$seed")
done
"$PYTHON" -m extensions.baselines.compare "${checkpoints[@]}" --data_dir $out/questions --known_paths $control/paths.json \
  --skips 3 --methods static,shortgpt,layerskip --train_questions 100 --test_questions 1000 --batch_size 128 \
  --work_dir $out/compared --output $out/results/positive_control.json
