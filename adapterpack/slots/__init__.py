"""Slots, the contract between a graph and the runtime: the inputs that a graph has for adapters at each site,
and the values that adapters write there.
"""
