"""Runs bundles under ONNX Runtime, without torch.

``OpenBundle`` (``open_bundle``) holds the ONNX Runtime sessions of a bundle. ``pipeline`` runs the graphs of
a task in order, with the inputs that they need besides those of the caller, ``adapters`` runs a graph with
the adapter of each row, and ``ort`` wraps ONNX Runtime itself. ``text`` and ``media`` turn texts and images
into inputs, and ``generation`` chooses tokens. ``engine`` batches requests as they arrive; ``sessions`` holds
the classes that callers use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
