"""The checks of ``adapterpack doctor``: of the installation, the machine, and adapterpack's caches.

One module for each topic: ``packages``, ``machine``, ``onnxruntime``, ``caches``, ``hub``; ``doctor`` runs
their checks.
"""
