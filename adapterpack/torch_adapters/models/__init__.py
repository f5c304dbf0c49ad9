"""Loads transformers models without adapters, within limits that protect from hostile configurations and
tokenizers.
"""
