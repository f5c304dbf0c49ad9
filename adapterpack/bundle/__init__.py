"""Reads, checks and writes bundles: deployable folders with graphs, adapters, a tokenizer and a manifest."""

import lazy_loader

FILE_NAME = "adapterpack.bundle.json"
"""The manifest's file name, by which a folder is recognized as a bundle."""
GENAI_FILE = "genai_config.json"
"""What onnxruntime-genai reads of a graph, in bundles for it and in folders of other tools."""

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
