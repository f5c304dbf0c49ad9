"""Reads and writes bytes on disk safely: atomic outputs, hashes, locks, safetensors, strict JSON and plain
YAML.
"""
