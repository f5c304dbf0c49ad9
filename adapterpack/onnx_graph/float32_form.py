"""Pieces of graphs that are run once on the CPU, to make slots or prompts of them: in float32 where the graph
is in bfloat16.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def in_float32(model: ir.Model) -> ir.Model:
    """Changes a graph of bfloat16 to one of float32 on the same numbers, and returns it; of another type it
    stays as it is.
    """
    graph, half, whole = model.graph, ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for value in graph.initializers.values():
        if value.dtype == half:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(whole)
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.dtype == half:
            value.type = ir.TensorType(whole)
    for node in graph:
        for name, attribute in list(node.attributes.items()):
            if name in ("to", "dtype") and attribute.value == half:
                node.attributes[name] = ir.AttrInt64(name, whole)
            elif (
                name == "value"
                and attribute.type == ir.AttributeType.TENSOR
                and attribute.value.dtype == half
            ):
                node.attributes[name] = ir.AttrTensor(
                    name, ir.tensor(attribute.value.numpy().astype(np.float32))
                )
    return model
