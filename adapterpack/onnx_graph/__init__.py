"""Reads ONNX files without loading weights: finds where initializers are stored, and which tensors of a
checkpoint they hold.
"""
