"""The paper's numbers, its tables and figures beside ours, and the style of all figures."""
