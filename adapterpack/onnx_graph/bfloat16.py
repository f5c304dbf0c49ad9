"""Runs bfloat16 graphs on providers that can only move bfloat16 numbers: each operator computes in float32
and its results are rounded.

ONNX Runtime's CPU provider has no bfloat16 arithmetic, so without this a bfloat16 graph could not be proved
without a GPU. A node gives the same result as a kernel that accumulates in float32; weights, caches and slots
stay in bfloat16.
"""

from __future__ import annotations

from pathlib import Path

from .node_types import value_types

_KIND = "tensor(bfloat16)"
_MOVERS = frozenset(
    {
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Gather",
        "GatherElements",
        "Identity",
        "Reshape",
        "Scatter",
        "ScatterElements",
        "ScatterND",
        "Shape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators for which the CPU provider has bfloat16 kernels."""


def computing_wide(path: Path) -> bytes:
    """Returns the model in a file, rewritten so that only casts and operators that move numbers use bfloat16;
    its external data stays in place.
    """
    import onnx  # noqa: PLC0415 - only what opens a graph pays for it
    from onnx import TensorProto  # noqa: PLC0415 - as above

    model = onnx.load(path, load_external_data=False)
    types = value_types(model)
    nodes = []
    wide = dict[str, str]()

    def cast(name: str, to: int, result: str) -> None:
        node = model.graph.node.add(op_type="Cast", input=[name], output=[result], name=f"{result}/cast")
        node.attribute.add(name="to", i=to, type=2)
        nodes.append(node)

    for node in list(model.graph.node):
        if node.op_type in _MOVERS and not node.domain:
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if types.get(name) == _KIND:
                if name not in wide:
                    wide[name] = f"{name}/wide"
                    cast(name, TensorProto.FLOAT, wide[name])
                node.input[place] = wide[name]
        nodes.append(node)
        for place, name in enumerate(node.output):
            if types.get(name) == _KIND:
                node.output[place] = f"{name}/unrounded"
                cast(node.output[place], TensorProto.BFLOAT16, name)
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    changed: bytes = model.SerializeToString()
    return changed
