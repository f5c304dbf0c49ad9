"""Proves what an adapter method promises, for our own tests and for those who write a method of their own.

    from adapterpack.testing import prove
    prove(my_method)          # raises AssertionError and names the config, the layer and the broken promise

An invariant is a check and the trait by which a method promises it. Crossed with example configs and a few
layers, the invariants are the test matrix; ``python -m adapterpack.testing`` prints which of its cells are
promised. Data are random with a fixed seed, in float64 unless an invariant says otherwise; adapters are fresh
ones moved by normal noise, as training would. Some invariants need torch.
"""

from .case import LAYERS, MODELS, SUBJECTS, Case, Layer, Model
from .matrix import INVARIANTS, Invariant, cases, prove, render

__all__ = [
    "INVARIANTS",
    "LAYERS",
    "MODELS",
    "SUBJECTS",
    "Case",
    "Invariant",
    "Layer",
    "Model",
    "cases",
    "prove",
    "render",
]
