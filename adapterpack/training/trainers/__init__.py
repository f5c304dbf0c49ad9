"""The kinds of training, one per file: the rows that each learns from, its trainer class, and its
settings.
"""
