"""What ``adapterpack doctor`` looks at: the installation, the machine, and what adapterpack keeps on it.

A file a topic: ``packages``, ``machine``, ``onnxruntime``, ``caches``, ``hub``; ``doctor`` runs their checks.
"""
