"""Execution providers of ONNX Runtime: chosen by name, configured by one typed value, and checked after a
session opens.

``provider`` defines a provider, and ``builtin`` lists those that have a wheel. ``device`` is the value that a
caller passes, and ``resolved_device`` turns it into ONNX Runtime's options. ``placement`` finds the nodes
that run on the CPU, with the table of supported kernels in ``kernels``, which needs no GPU.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
