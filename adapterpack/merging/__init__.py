"""Adapters folded into checkpoints, by row blocks, without torch."""
