"""Runs bundles under ONNX Runtime, without torch.

``OpenBundle`` (``open_bundle``) holds the ONNX Runtime sessions of a bundle. ``pipeline`` runs the graphs of
a task in order, ``model_inputs`` adds the inputs that a graph needs besides those of the caller, ``adapters``
runs a graph with the adapter of each row, and ``ort`` wraps ONNX Runtime itself. ``text``, ``media`` and
``preparing_bundle`` turn texts and images into inputs, and ``generation`` chooses tokens. ``engine`` batches
requests as they arrive; ``sessions`` holds the classes that callers use.
"""
