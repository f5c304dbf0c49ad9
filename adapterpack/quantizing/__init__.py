"""Quantizes packs and bundles, and measures the error."""
