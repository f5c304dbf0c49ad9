"""Bundles under ONNX Runtime, without torch.

``session`` is what callers use, and ``open_bundle`` what it has open. A pass goes through ``pipeline`` (the
graphs of a task, in order), ``model_inputs`` (what a graph is fed besides a caller's inputs), ``adapters`` (a
graph run with each row's adapter) and ``ort_model``. ``generation`` repeats passes token by token; ``text``
and ``media`` prepare what rows hold; ``run`` takes rows from end to end.
"""
