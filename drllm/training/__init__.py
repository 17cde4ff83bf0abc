"""Step 2: from labels to routers."""
