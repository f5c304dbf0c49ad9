"""The activations of block adapters as ONNX operators that every opset has, under the names that their
configs use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Op = Callable[..., Any]
"""``op(name, *inputs)`` adds a node and returns its output; an input may be a number."""


def _silu(op: Op, x: Any) -> Any:
    return op("Mul", x, op("Sigmoid", x))


def _gelu(op: Op, x: Any) -> Any:
    erf = op("Erf", op("Mul", x, math.sqrt(0.5)))
    return op("Mul", op("Mul", x, 0.5), op("Add", erf, 1.0))


def _gelu_tanh(op: Op, x: Any) -> Any:
    cube = op("Mul", op("Mul", op("Mul", x, x), x), 0.044715)
    tanh = op("Tanh", op("Mul", op("Add", x, cube), math.sqrt(2 / math.pi)))
    return op("Mul", op("Mul", x, 0.5), op("Add", tanh, 1.0))


NODES: dict[str, Callable[[Op, Any], Any]] = {
    "identity": lambda op, x: x,
    "relu": lambda op, x: op("Relu", x),
    "tanh": lambda op, x: op("Tanh", x),
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
"""Name -> the nodes of an activation on ``x``."""
