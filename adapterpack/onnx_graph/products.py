"""Reads and sets how exactly the quantized products of a graph are computed: with float activations, or with
activations rounded to int8 in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

QUANTIZED = frozenset({"MatMulNBits", "MatMulBnb4"})
"""Operators that multiply with codes."""
PRODUCTS = QUANTIZED | {"MatMul", "Gemm"}
"""Operators that can implement a linear layer."""
_LEVEL, _EXACT, _FAST = "accuracy_level", 0, 4
"""The attribute of MatMulNBits that sets the accuracy, and its values."""
PACKED = 2 << 30
"""Bytes of codes up to which a few runs of a graph have them prepacked."""


def is_fast(path: Path) -> bool | None:
    """Whether the quantized products of the graph at ``path`` round their activations; None for a graph
    without such products.
    """
    levels = {node.attributes.get_int(_LEVEL, _EXACT) for node in _products(ir.load(path))}
    return _FAST in levels if levels else None


def runs_mapped(path: Path) -> bool:
    """Whether a few runs of the graph at ``path`` leave its weights in the mapped file: quantized products
    are quick with prepacked weights alone, but these are a second copy of the codes in memory.
    """
    model = ir.load(path)
    held = (node.inputs[1].const_value for node in _products(model) if node.inputs[1] is not None)
    codes = [tensor.nbytes for tensor in held if tensor is not None]
    return not codes or sum(codes) > PACKED


def make_fast(path: Path, fast: bool = True) -> None:
    """Makes every quantized product of the graph at ``path`` round its activations to int8, or none of them;
    weights stay where they are.
    """
    model = ir.load(path)
    for node in _products(model):
        node.attributes[_LEVEL] = ir.AttrInt64(_LEVEL, _FAST if fast else _EXACT)
    ir.save(model, path)


def _products(model: ir.Model) -> Iterator[ir.Node]:
    return (
        node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.op_type == "MatMulNBits"
    )
