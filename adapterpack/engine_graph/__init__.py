"""Derives the engine's graph from a bundle's ordinary decoder and proves that both agree; export, merge and
quantize call it.
"""
