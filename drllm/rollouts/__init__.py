"""What a model answers along paths, batched."""
