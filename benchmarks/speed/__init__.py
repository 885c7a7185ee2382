"""Time and memory, as ratios."""
