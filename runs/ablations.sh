#!/usr/bin/env bash
# Ablations of the training on the demo's labels (Figures 5, 7, 8, Table 6, teacher forcing, bias initialisation), with as
# many epochs and warm-up steps as suit so few labels. Ten minutes on one core. Run it again to resume.
source "$(dirname "$0")/settings.sh"

out=out/demo
"$PYTHON" data_generation.py --data_dir miniature/data --samples 60 --limit 120 --output_dir $out/data
for name in figure5 figure7 figure8 table6 teacher_forcing bias_init; do
  "$PYTHON" -m experiments.ablations $name --data $out/data --limit 100 --num_epochs 15 --warmup_steps 50 \
    --work_dir $out/ablations --output $out/ablations
done
