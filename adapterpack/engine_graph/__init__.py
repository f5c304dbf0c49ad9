"""Writes the engine's graph into a bundle and proves that it agrees with the ordinary decoder, for export,
merge and quantize.
"""
