"""Proof that a graph computes what the model does: parity runs against torch."""
