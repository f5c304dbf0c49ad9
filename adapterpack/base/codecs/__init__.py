"""Reads and writes weights, plain or in the formats of quantized checkpoints, without the libraries of these
formats.
"""
