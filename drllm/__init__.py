"""What the scripts of this repository share: tasks, search, labels, features, training, evaluation."""
