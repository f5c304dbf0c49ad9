"""Changes ONNX graphs in memory: finds sites, attaches adapters, packs siblings, and makes the engine's
decoder.

A pass is a function of an ``onnx_ir`` model, which it changes in place. Its docstring says what it requires
of a graph and what it ensures; a graph that it cannot change is left as it is, or refused with the reason.
"""
