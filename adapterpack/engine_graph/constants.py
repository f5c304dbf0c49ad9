"""Constants that the engine's graph has and the ordinary one has not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

PREFIX = "decoder/"
"""What the names of nodes and constants of the engine's graph begin with."""


def constant(model: Any, name: str, array: np.ndarray) -> Any:
    """The constant of that name, put into the graph once."""
    known = model.graph.initializers.get(f"{PREFIX}{name}")
    if known is not None:
        return known
    tensor = ir.tensor(array, name=f"{PREFIX}{name}")
    value = ir.Value(
        name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value
