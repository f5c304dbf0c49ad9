"""Reads, checks and writes bundles: deployable folders with graphs, adapters, a tokenizer and a manifest."""

FILE_NAME = "adapterpack.bundle.json"
"""The manifest's file name, by which a folder is recognized as a bundle."""
GENAI_FILE = "genai_config.json"
"""What onnxruntime-genai reads of a graph, in bundles for it and in folders of other tools."""
