"""Labels from groups of similar questions, a rival of the published labels."""
