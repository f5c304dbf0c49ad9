"""The normal forms of adapters that do not change a weight: prompts, branches on a block's output, and
prompts inside attention.
"""
