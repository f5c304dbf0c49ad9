"""Exports a base and packs to a bundle: builds the graph, attaches the adapters, and proves the result
against torch.
"""
