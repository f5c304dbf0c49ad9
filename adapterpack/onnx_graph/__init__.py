"""Reads ONNX files without loading weights: where initializers are stored, and which of them hold which
tensor of a checkpoint.
"""
