"""Writes the engine's graph into a bundle and proves that it agrees with the ordinary decoder; export, merge
and quantize call it.
"""
