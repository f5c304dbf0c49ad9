"""Formats of quantized weights: one file each, read and written by row blocks without their libraries."""
