"""Sixteen-bit floats: stores weights in half of the bytes; ONNX Runtime widens them when it opens the graph.

ONNX Runtime's kernels for CPUs multiply in float32, so that a run is neither faster nor slower. A graph that
also computes in sixteen bits is exported with ``--dtype``.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from ....bundle import ADDED
from ....onnx_graph import named_node
from .. import GRAPH_SCHEMES, GraphScheme, Rewriting


def _stored_as(dtype: ir.DataType) -> Callable[[Rewriting], int]:
    def rewrite(rewriting: Rewriting) -> int:
        graph = rewriting.model.graph
        count = 0
        inputs = {value.name for value in graph.inputs}
        for name, value in list(graph.initializers.items()):
            if (
                name in inputs
                or name.startswith(ADDED)
                or value.dtype != ir.DataType.FLOAT
                or len(value.shape) < 2
            ):
                continue
            numbers = value.const_value.numpy().astype(dtype.numpy())
            narrow = ir.val(
                name, const_value=rewriting.file.append(ir.tensor(numbers, dtype=dtype, name=name))
            )
            wide = named_node("Cast", f"{name}/wide", narrow, to=ir.DataType.FLOAT)
            wide.outputs[0].shape, wide.outputs[0].type = value.shape, value.type
            value.replace_all_uses_with(wide.outputs[0])
            graph.initializers.pop(name)
            graph.register_initializer(narrow)
            graph.insert_before(graph[0], wide)
            count += 1
        return count

    return rewrite


for _name, _dtype in (("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16)):
    GRAPH_SCHEMES.register(
        GraphScheme(
            _name,
            f"weights stored in sixteen bits ({_dtype.name.lower()}), products in float32",
            _stored_as(_dtype),
            tolerance=0.1,
        )
    )
