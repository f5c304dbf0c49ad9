"""The ways of training, one a file: what each learns from, whose trainer it is, and its own settings."""
