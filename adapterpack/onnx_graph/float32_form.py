"""Converts bfloat16 graphs to float32, for parts of graphs that run once on the CPU to compute slots or
prompts.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def in_float32(model: ir.Model) -> ir.Model:
    """Converts a bfloat16 graph to float32 with the same numbers, and returns it; returns a graph of another
    type unchanged.
    """
    graph = model.graph
    half = ir.DataType.BFLOAT16
    whole = ir.DataType.FLOAT
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
