"""Question sets: how they are read, how they are asked, and how answers are graded."""
