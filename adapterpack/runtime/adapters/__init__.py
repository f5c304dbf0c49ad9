"""Runs graphs with the adapter of each row: adapters in bank slots, in files of slot values, or as prompts in
the KV cache.
"""
