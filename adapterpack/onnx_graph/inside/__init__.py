"""What runs in the sandbox processes that :mod:`adapterpack.onnx_graph.apart` starts; each module imports
what its function needs alone.
"""
