"""Compiled kernels for merges and for the LoRAs of a batch's rows; numpy and ONNX Runtime's own operators do
the same where nothing was compiled.
"""
