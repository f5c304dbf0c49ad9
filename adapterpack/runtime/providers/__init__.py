"""Execution providers of ONNX Runtime: chosen by name, opened with settings of one typed value, and checked
after a session opens.

``provider`` is what a provider is, and ``builtin`` are those that have a wheel. ``device`` is the value that
a caller gives, and ``starting`` makes ONNX Runtime's options of it. ``placement`` looks where every node
runs, with ``kernels``, the table of what a provider implements, which needs no card.
"""
