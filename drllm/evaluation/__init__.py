"""Step 3: lm-eval with routing, layer counts, tables and figures."""
