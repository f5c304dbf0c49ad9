"""What runs in the sandbox processes that :mod:`adapterpack.onnx_graph.sandboxed_check` starts; each module
imports what its function needs alone.
"""
