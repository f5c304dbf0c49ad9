"""Entry points of the sandbox processes that :mod:`adapterpack.onnx_graph.sandboxed_check` starts; each
module imports only what its function needs.
"""
