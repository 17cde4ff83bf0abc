"""Step 1: the tree search for paths, its pool of questions, and the label folder while it is written."""
