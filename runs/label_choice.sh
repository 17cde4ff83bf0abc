#!/usr/bin/env bash
# Labels that are less a matter of chance, on the miniature: searches of wrong questions that go on after the first right
# path, and the right path on which trained routers agree instead of the one that the search met first. Ten minutes on one
# core; results/miniature/label_choice has the table. Run it again to resume.
source "$(dirname "$0")/settings.sh"

out=out/label_choice
train() { "$PYTHON" train.py --data "$1" --output_dir $out/checkpoints --run_name "$2" --seed "$3" --num_epochs 15 --warmup_steps 50; }
named=()
for stop in wrong_to_right never; do
  "$PYTHON" data_generation.py --data_dir miniature/data --samples 60 --limit 120 --stop_at $stop --output_dir $out/$stop
  for seed in 0 1 2; do
    train $out/$stop $stop-$seed $seed
    named+=(--checkpoint "search stops $stop=$out/checkpoints/$stop-$seed")
  done
  for price in 0 1.2; do
    "$PYTHON" -m extensions.agreement --data $out/$stop --checkpoint $out/checkpoints/$stop-0 --price $price \
      --batch_size 128 --output_dir $out/$stop-agreed-$price
    for seed in 0 1 2; do
      train $out/$stop-agreed-$price $stop-agreed-$price-$seed $seed
      named+=(--checkpoint "search stops $stop, agreed, price $price=$out/checkpoints/$stop-agreed-$price-$seed")
    done
  done
done
"$PYTHON" -m extensions.baselines.compare "${named[@]}" --data_dir miniature/data --skips 3 --methods static --train_questions 60 \
  --batch_size 128 --work_dir $out/compared --output $out/results/label_choice.json
