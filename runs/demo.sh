#!/usr/bin/env bash
# The three steps on the bundled toy model, with fewer labels per set than the paper's. Run it again to resume.
# Two minutes on two cores; README.md has the table that it prints.
source "$(dirname "$0")/settings.sh"

out=out/demo
"$PYTHON" data_generation.py --data_dir miniature/data --samples 60 --limit 120 --output_dir $out/data
"$PYTHON" train.py --data $out/data --output_dir $out/checkpoints --run_name demo --num_epochs 15 --warmup_steps 50
./eval.sh $out/checkpoints/demo --data_dir miniature/data --labels $out/data --output_dir $out/results
