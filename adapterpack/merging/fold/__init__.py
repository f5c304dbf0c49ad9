"""Computes merged weights block by block: decode, add the change, round, and measure the loss."""
