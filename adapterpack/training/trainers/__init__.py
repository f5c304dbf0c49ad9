"""The kinds of training: the rows that each learns from, its trainer class, and its settings."""
