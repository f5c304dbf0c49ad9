"""A product of a graph with a constant weight, and the quantized product that replaces it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx_ir as ir

from ...adapter_methods import row_blocks
from ...onnx_graph import (
    CODES,
    LARGEST,
    SCALES,
    BlockGrid,
    SlicedTensor,
    exact_nodes,
    in_order,
    pack_codes,
    pack_nibbles,
    pack_zeros,
)

if TYPE_CHECKING:
    import onnx


_AT_ONCE = 1 << 24
"""The most numbers of a weight to round at a time."""
Second = Callable[[str], np.ndarray | None]
"""Returns the mean of ``x xᵀ`` ``[in, in]`` of an input by its name, or None without calibration rows."""


class RoundingSetting(NamedTuple):
    """How to quantize a product: the scheme that replaces it, the bits of a code, the number of weights that
    share a scale (0: a whole column), whether codes are symmetric around zero, and the name of the rounding
    algorithm.
    """

    scheme: str
    bits: int
    block_size: int
    symmetric: bool
    algorithm: str = "rtn"


class Codes(NamedTuple):
    """A weight as codes ``[out, blocks, block]``, unsigned integers on a grid ``[out, blocks]``.

    ``divisor`` ``[in]``, if set, divides each input before the product, whose weights contain it as a factor.
    Column ``i`` of the codes belongs to input ``order[i]``, if ``order`` is set. ``minimum`` ``[out,
    blocks]`` is added to the numbers of each block.
    """

    q: np.ndarray
    grid: BlockGrid
    divisor: np.ndarray | None = None
    order: np.ndarray | None = None
    minimum: np.ndarray | None = None


@dataclass(frozen=True)
class ConstantProduct:
    """A ``MatMul`` of ``model`` with the initializer ``weight``, which a node may transpose first.

    ``second`` is the mean of ``x xᵀ`` ``[in, in]`` over the inputs of calibration rows, for algorithms that
    use it.
    """

    node: ir.Node
    weight: ir.Value
    model: ir.Model
    second: np.ndarray | None = None

    @property
    def dtype(self) -> ir.DataType:
        """The float type of the weight in the graph."""
        return self.weight.const_value.dtype

    @property
    def _straight(self) -> bool:
        """Whether the product reads the weight as it is stored, ``[in, out]``, without a transposition."""
        return self.weight is self.node.inputs[1]

    @property
    def width(self) -> int:
        """The number of inputs of the product."""
        return int(self.weight.shape[0 if self._straight else 1])

    @property
    def out(self) -> int:
        """The number of outputs of the product."""
        return int(self.weight.shape[-1 if self._straight else 0])

    def matrix(self) -> np.ndarray:
        """Loads the weight, ``[in, out]`` in the graph's type, in the order in which it is stored."""
        numbers: np.ndarray = self.weight.const_value.numpy()
        return numbers if self._straight else numbers.T

    def columns(self, numbers: int) -> Iterator[np.ndarray]:
        """Yields the weight as :meth:`matrix` does, in groups of columns of about so many numbers; a stack of
        matrices at once.
        """
        tensor = self.weight.const_value
        read = tensor.read if isinstance(tensor, SlicedTensor) else tensor.numpy().__getitem__
        if len(tensor.shape) != 2:
            yield read((...,))
            return
        for block in row_blocks(self.out, self.width, numbers):
            yield read((..., block)) if self._straight else read((block,)).T

    def rows(self) -> np.ndarray:
        """Loads the weight as a linear layer stores it, ``[out, in]`` in float32."""
        return np.ascontiguousarray(self.matrix().T, dtype=np.float32)

    def alone(self, matrix: np.ndarray) -> onnx.ModelProto:
        """Returns an ``onnx`` model with the product as its only node, with ``matrix`` as its weight."""
        # each slice in order: a turned head is larger than any other weight
        weight = _initializer(ir.Tensor(in_order(matrix), dtype=self.dtype, name=self.weight.name))
        product = ir.Node("", "MatMul", [self.input(), weight], name=self.node.name)
        proto = ir.to_proto(ir.Model(self._graph([product], [weight]), ir_version=self.model.ir_version))
        weight.const_value = None  # a graph is a reference cycle: free the numbers now
        return proto

    def in_bits(self, codes: Codes, bits: int) -> ir.Graph:
        """Returns the graph of a ``MatMulNBits`` on codes, including the nodes before it and the terms added
        to it.
        """
        out, blocks, block = codes.q.shape
        graph = _Nodes(self)
        x = graph.x
        if codes.divisor is not None:
            x = graph.divided(codes.divisor)
        if codes.order is not None:
            order = graph.constant("order", codes.order.astype(np.int64))
            x = graph.add("Gather", "/ordered", x, order, axis=-1)
            x.shape, x.type = graph.x.shape, graph.x.type
        stored = [
            graph.constant(f"Q{bits}", pack_codes(codes.q.astype(np.uint8), bits)),
            graph.floats("scales", codes.grid.scale),
        ]
        if not codes.grid.symmetric:
            stored.append(graph.constant("zero_points", pack_zeros(bits, codes.grid)))
        y = graph.product("MatMulNBits", f"_Q{bits}", x, *stored, N=out, bits=bits, block_size=block)
        if codes.minimum is not None:  # (q s + m) x = q s x + m (the sum of x over the block)
            runs = np.array([*[0] * (len(x.shape) - 1), blocks, block], np.int64)
            split = graph.add("Reshape", "/blocks", x, graph.constant("runs", runs))
            axis = graph.constant("axis", np.array([-1], np.int64))
            sums = graph.add("ReduceSum", "/sums", split, axis, keepdims=0)
            minima = graph.floats("minima", np.ascontiguousarray(codes.minimum.T))
            y = graph.add("Add", "/shifted", y, graph.add("MatMul", "/least", sums, minima))
        return graph.ending_with(y)

    def in_table(self, q: np.ndarray, scale: np.ndarray, block: int, kind: int) -> ir.Graph:
        """Returns the graph of a ``MatMulBnb4`` on codes ``[out, in]`` of table ``kind``, with one scale for
        each ``block`` of them.
        """
        graph = _Nodes(self)
        stored = graph.constant("Q4", pack_nibbles(q)), graph.floats("absmax", scale)
        y = graph.product("MatMulBnb4", "_Q4", graph.x, *stored, N=len(q), block_size=block, quant_type=kind)
        return graph.ending_with(y)

    def in_columns(self) -> ir.Graph:
        """Returns the graph of the exact product on codes in eight bits, each column to nearest with a scale
        of its own; with calibration rows, of smoothed inputs.
        """
        graph = _Nodes(self)
        blocks = []
        steps = []
        divisor = None if self.second is None else self._smoothing(np.diag(self.second))
        for columns in self.columns(_AT_ONCE):
            numbers = columns.astype(np.float32) * (1 if divisor is None else divisor[:, None])
            step = np.abs(numbers).max(0) / np.float32(LARGEST)
            blocks.append(np.rint(numbers / np.where(step, step, 1)).astype(np.int8))
            steps.append(step)
        codes = graph.constant(CODES, np.concatenate(blocks, axis=1))
        scales = graph.constant(SCALES, np.concatenate(steps))
        x = graph.x if divisor is None else graph.divided(divisor)
        graph.nodes += exact_nodes(self.node.name, x, codes, scales, self.dtype)
        return graph.ending_with(graph.nodes[-1].outputs[0])

    def _smoothing(self, squares: np.ndarray) -> np.ndarray:
        """Returns what divides each input ``[in]``, of whose squares these are the means, and multiplies its
        weights, so that few large inputs do not make the steps of all others coarse.

        Source: Xiao et al. 2023, "SmoothQuant", equation 4 with an exponent of a half, and the root mean
        square in place of the largest input.
        """
        size = np.sqrt(np.maximum(squares, 0))
        largest = np.max([np.abs(columns).max(1) for columns in self.columns(_AT_ONCE)], axis=0)
        ratio = np.maximum(size, 1e-4 * size.max()) / np.maximum(largest, 1e-4 * largest.max())
        factors: np.ndarray = np.sqrt(ratio / np.exp(np.log(ratio).mean())).astype(np.float32)
        return factors

    def input(self) -> ir.Value:
        """Returns a new value with the name, shape and type of the product's input."""
        x, y = self.node.inputs[0], self.node.outputs[0]
        # The graph may not state what an adapter that changes the input has made of it.
        shape = x.shape
        if shape is None and y.shape is not None:
            shape = ir.Shape([*y.shape[:-1], self.width])
        return ir.val(x.name, shape=shape, type=x.type or ir.TensorType(self.dtype))

    def _graph(
        self, nodes: Sequence[ir.Node], constants: Sequence[ir.Value], x: ir.Value | None = None
    ) -> ir.Graph:
        (y,), old = nodes[-1].outputs, self.node.outputs[0]
        y.name, y.shape, y.type = old.name, old.shape, old.type
        return ir.Graph(
            [nodes[0].inputs[0] if x is None else x],
            [y],
            nodes=nodes,
            initializers=constants,
            opset_imports={**self.model.opset_imports, "com.microsoft": 1},
            name="product",
        )


class _Nodes:
    """Collects the nodes and constants that replace a product."""

    def __init__(self, product: ConstantProduct) -> None:
        self.replaced = product
        self.x = product.input()
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def constant(self, role: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        name = f"{self.replaced.weight.name}_{role}"
        self.constants.append(_initializer(ir.tensor(array, dtype=dtype, name=name)))
        return self.constants[-1]

    def floats(self, role: str, array: np.ndarray) -> ir.Value:
        return self.constant(role, array.astype(self.replaced.dtype.numpy()), self.replaced.dtype)

    def add(self, op: str, role: str, *inputs: ir.Value, domain: str = "", **attributes: object) -> ir.Value:
        name = f"{self.replaced.node.name}{role}"
        self.nodes.append(ir.node(op, list(inputs), attributes, domain=domain, name=name))
        (y,) = self.nodes[-1].outputs
        y.name = f"{name}:0"
        return y

    def divided(self, divisor: np.ndarray) -> ir.Value:
        """Divides the product's input ``[in]`` by constants."""
        y = self.add("Mul", "/scaled", self.x, self.floats("factors", np.reciprocal(divisor)))
        y.shape, y.type = self.x.shape, self.x.type
        return y

    def product(self, op: str, role: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        """Adds the operator that multiplies and returns its output; ``K`` is the weight's."""
        y = self.add(op, role, *inputs, domain="com.microsoft", K=self.replaced.width, **attributes)
        y.shape, y.type = self.replaced.node.outputs[0].shape, self.replaced.node.outputs[0].type
        return y

    def ending_with(self, y: ir.Value) -> ir.Graph:
        """Returns the graph, whose output gets the name of the replaced output."""
        return self.replaced._graph(self.nodes, self.constants, self.x)


def _initializer(tensor: ir.TensorProtocol) -> ir.Value:
    return ir.val(tensor.name, const_value=tensor)


def output_error(change: np.ndarray, second: np.ndarray | None) -> float:
    """Returns the mean over inputs of ``|D x|²`` for a change ``D`` ``[out, in]`` of the weight: ``tr(D S
    Dᵀ)`` with ``S`` the mean of ``x xᵀ``; without one, the squared norm of ``D``.

    Example:
        >>> output_error(np.array([[1.0, 2.0]]), np.diag([4.0, 1.0]))
        8.0
    """
    if second is None:
        return float(np.sum(np.square(change, dtype=np.float64)))
    return float(np.sum((change @ second.astype(change.dtype)) * change, dtype=np.float64))
