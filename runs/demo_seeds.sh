#!/usr/bin/env bash
# The demo's spread: three draws of labels (seeds of the search) times two seeds of training. Twenty minutes on one core.
# results/miniature has the table: points against the base, and their spread over draws.
source "$(dirname "$0")/settings.sh"

out=out/demo_seeds
"$PYTHON" miniature/make.py questions --train 800 --test 500 --output_dir $out/questions
draws=()
for seed in 0 1 2; do
  "$PYTHON" data_generation.py --data_dir miniature/data --samples 60 --limit 120 --seed $seed --output_dir $out/labels$seed
  draws+=("$out/labels$seed")
done
"$PYTHON" -m experiments.label_choice --labels "${draws[@]}" --output $out/results/label_choice.json
"$PYTHON" -m experiments.ablations draws --draws "${draws[@]}" --seeds 0,1 --data_dir $out/questions --limit 500 \
  --num_epochs 15 --warmup_steps 50 --work_dir $out/work --output $out/results
