"""Opens base models on disk without torch: their checkpoints, fingerprints, and quantized formats."""
