"""Passes that change ONNX graphs in memory: they find sites, attach adapters, pack sibling projections, and
build the engine's decoder.

A pass is a function that changes an ``onnx_ir`` model in place. Its docstring states what it requires of a
graph and what it ensures. A pass that only makes a graph smaller or faster leaves what it cannot change as it
is; any other pass refuses such a graph with the reason.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
