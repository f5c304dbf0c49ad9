"""Wraps ONNX Runtime: opens and runs graphs, and converts their values."""
