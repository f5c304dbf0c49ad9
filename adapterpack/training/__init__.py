"""Training runs: configuration, data, the kinds of training, and the glue to ``transformers.Trainer``."""
