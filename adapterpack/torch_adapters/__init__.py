"""Adapters in torch models: the sites that they change, the modules that hold them, how they get in, are
saved and come out again.
"""
