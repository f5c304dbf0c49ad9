"""Reads base models on disk: checkpoints, fingerprints, and the formats in which weights are stored."""
