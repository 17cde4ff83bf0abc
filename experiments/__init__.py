"""Programs that compare: ablations, control knob, methods, backbones, and the prompt inspector."""
