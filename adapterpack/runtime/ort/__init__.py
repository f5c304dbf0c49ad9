"""Graphs under ONNX Runtime: opened, run, and the values that go in and out."""
