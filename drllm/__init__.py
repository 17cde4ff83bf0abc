"""What the three steps share, one folder per step."""
