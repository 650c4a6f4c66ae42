"""What to try, what it showed, and what was taken (specification, L)."""
