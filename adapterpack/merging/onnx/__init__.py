"""Adapters folded into ONNX graphs: initializers changed in place, by the same arithmetic as a checkpoint's tensors."""
