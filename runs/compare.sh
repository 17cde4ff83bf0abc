#!/usr/bin/env bash
# Routers beside other methods on 13,300 test questions of the toy model: five seeds as published, five on labels of
# groups. An hour on one core; results/miniature has the table. Run it again to resume.
source "$(dirname "$0")/settings.sh"

out=out/compare
"$PYTHON" miniature/make.py questions --train 1900 --test 1900 --output_dir $out/questions
"$PYTHON" data_generation.py --data_dir $out/questions --samples 300 --limit 800 --output_dir $out/labels
"$PYTHON" -m extensions.groups.search --data_dir $out/questions --limit 300 --output_dir $out/group_labels
checkpoints=()
for seed in 0 1 2 3 4; do
  for kind in labels group_labels; do
    "$PYTHON" train.py --data $out/$kind --output_dir $out/checkpoints --run_name $kind-$seed --seed $seed \
      --num_epochs 15 --warmup_steps 100
  done
  checkpoints+=(--checkpoint "as published=$out/checkpoints/labels-$seed")
  checkpoints+=(--checkpoint "labels of groups=$out/checkpoints/group_labels-$seed")
done
"$PYTHON" -m extensions.baselines.compare "${checkpoints[@]}" --data_dir $out/questions --skips 3 \
  --methods static,shortgpt,layerskip,ceiling --train_questions 400 --batch_size 128 \
  --work_dir $out/compared --output $out/results/compare.json
