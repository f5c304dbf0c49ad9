"""Bundles under ONNX Runtime: sessions, adapter bank, generation; without torch."""
