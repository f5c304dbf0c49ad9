"""One product of a graph with a constant weight, and the quantized product that stands in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from ...onnx_graph.nbits import Grid, packed_codes, packed_zeros


class Setting(NamedTuple):
    """What a product is quantized to: the scheme that replaces it, the bits of a code, how many weights share a scale, whether zero
    lies in the middle of the codes, and the name of the algorithm that rounds.
    """

    scheme: str
    bits: int
    block_size: int
    symmetric: bool
    algorithm: str = "rtn"


class Codes(NamedTuple):
    """A weight as codes ``[out, blocks, block]``, whole numbers from zero, on a grid ``[out, blocks]``.

    ``divisor`` ``[in]`` is what each input is divided by before the product, whose weights hold it as a factor; or None.
    """

    q: np.ndarray
    grid: Grid
    divisor: np.ndarray | None = None


@dataclass(frozen=True)
class Product:
    """A ``MatMul`` of ``model`` with the initializer ``weight``, which may be transposed on the way.

    ``second`` is the mean of ``x xᵀ`` ``[in, in]`` over the inputs of calibration rows, of an algorithm that looks at them.
    """

    node: Any
    weight: Any
    model: Any
    second: np.ndarray | None = None

    @property
    def dtype(self) -> Any:
        """The float type of the weight in the graph."""
        return self.weight.const_value.dtype

    def matrix(self) -> np.ndarray:
        """The weight in memory, ``[in, out]`` in the graph's type."""
        numbers = self.weight.const_value.numpy()
        return numbers if self.weight is self.node.inputs[1] else np.ascontiguousarray(numbers.T)

    def rows(self) -> np.ndarray:
        """The weight as a linear layer has it, ``[out, in]`` in float32."""
        return np.ascontiguousarray(self.matrix().T, dtype=np.float32)

    def alone(self) -> Any:
        """The product as the only node of a model, as ``onnx`` has it, with its weight in memory."""
        weight = initializer(ir.Tensor(self.matrix(), dtype=self.dtype, name=self.weight.name))
        product = ir.Node("", "MatMul", [self._input(), weight], name=self.node.name)
        return ir.to_proto(ir.Model(self._graph([product], [weight]), ir_version=self.model.ir_version))

    def in_bits(self, codes: Codes, bits: int) -> Any:
        """The graph of a ``MatMulNBits`` on codes, with the division before it where there is one."""
        out, _, block = codes.q.shape
        name, x = self.weight.name, self._input()
        inputs, nodes, constants = x, [], []
        if codes.divisor is not None:
            factors = _tensor(np.reciprocal(codes.divisor), self.dtype, f"{name}_factors")
            nodes.append(ir.node("Mul", [x, factors], name=f"{self.node.name}/scaled"))
            constants, inputs = [factors], nodes[0].outputs[0]
            inputs.name, inputs.shape, inputs.type = f"{self.node.name}/scaled:0", x.shape, x.type
        stored = [initializer(ir.tensor(packed_codes(codes.q.astype(np.uint8), bits), name=f"{name}_Q{bits}")),
                  _tensor(codes.grid.scale, self.dtype, f"{name}_scales")]
        if not codes.grid.symmetric:
            stored.append(initializer(ir.tensor(packed_zeros(bits, codes.grid), name=f"{name}_zero_points")))
        attributes = {"K": self.matrix().shape[0], "N": out, "bits": bits, "block_size": block}
        nodes.append(ir.node("MatMulNBits", [inputs, *stored], attributes, domain="com.microsoft", name=f"{self.node.name}_Q{bits}"))
        return self._graph(nodes, [*constants, *stored], x)

    def _input(self) -> Any:
        x = self.node.inputs[0]
        return ir.Value(name=x.name, shape=x.shape, type=x.type)

    def _graph(self, nodes: Sequence[Any], constants: Sequence[Any], x: Any = None) -> Any:
        (y,), old = nodes[-1].outputs, self.node.outputs[0]
        y.name, y.shape, y.type = old.name, old.shape, old.type
        return ir.Graph([nodes[0].inputs[0] if x is None else x], [y], nodes=nodes, initializers=constants,
                        opset_imports={**self.model.opset_imports, "com.microsoft": 1}, name="product")


def initializer(tensor: Any) -> Any:
    """A tensor as a value that a graph can hold."""
    return ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def _tensor(array: np.ndarray, dtype: Any, name: str) -> Any:
    return initializer(ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name))
