"""Merges adapters into checkpoints, GGUF files and ONNX graphs, block by block, without torch."""
