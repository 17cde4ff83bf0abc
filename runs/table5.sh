#!/usr/bin/env bash
# Table 5 on the toy model: every method at one block saved, on 2,800 test questions, three seeds. Half an hour on one core.
source "$(dirname "$0")/settings.sh"

out=out/demo
runs/demo.sh PYTHON="$PYTHON"
"$PYTHON" -m extensions.baselines.compare --checkpoint "as published=$out/checkpoints/demo" --skips 1 --seeds 3 \
  --methods static,shortgpt,layerskip,mindskip,flexidepth,knob,random,ceiling --work_dir $out/table5 \
  --output $out/table5.json
