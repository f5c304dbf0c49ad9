"""Bundles under ONNX Runtime: sessions, adapter bank, generation; without torch."""

FILE_NAME = "adapterpack.bundle.json"
"""The manifest of a bundle, which tells its folder from others."""
