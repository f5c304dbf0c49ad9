"""Bundles under ONNX Runtime, without torch.

``open_bundle`` is a bundle that ONNX Runtime has open. A pass goes through ``pipeline`` (the graphs of a
task, in order), ``model_inputs`` (what a graph is fed besides a caller's inputs), ``adapters`` (a graph run
with each row's adapter) and ``ort``. ``text``, ``media`` and ``preparing_bundle`` prepare what rows hold, and
``generation`` chooses tokens. ``engine`` runs requests together, and ``sessions`` is what callers use.
"""
