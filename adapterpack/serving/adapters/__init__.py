"""The adapters of a server that runs: which packs it may load, under which names they answer, and how they
change.
"""
