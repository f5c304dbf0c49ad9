"""ONNX files as they lie on disk: where each initializer's bytes are, and which initializer holds which tensor of a checkpoint.

Nothing here imports torch, and no weight is loaded whole.
"""
