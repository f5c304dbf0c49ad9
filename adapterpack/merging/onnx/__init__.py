"""Merges adapters into ONNX graphs: initializers are changed with the same arithmetic as a checkpoint's
tensors.
"""
