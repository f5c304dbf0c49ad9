"""Adds a low-rank correction of the base's quantization error to the quantized graph.

To each quantized product ``Wq x`` this adds a term ``B A x`` that approximates its error ``E = W - Wq``: the
largest singular values of ``E`` (LQER, Zhang et al., https://arxiv.org/abs/2402.02446, section 3.2) or, with
calibration rows, of ``E S^½`` with ``S`` the mean of ``x xᵀ``, so that the error of the outputs is as small
as it can be at this rank: ``A = Vᵀ S^-½`` (EoRA, Liu et al., https://arxiv.org/abs/2410.21271, section 3.2,
which writes ``S^½`` by its eigenvectors). Both factors are int8: every step reads them, and as floats they
would have as many bytes as the int4 weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...bundle import Bundle, CompensationReport
from ...errors import NothingToDo
from ...lowrank import Cut, Factors, InMemory, largest
from ...onnx_graph import add_initializer, fresh_grid, nearest, split_blocks, stored_grid, unpack, values
from .product import Second, output_error
from .replace_products import find_head, find_products
from .tensor_file import TensorFile

_DAMPING = 1e-3
"""The addition to the diagonal of ``S``, as a share of its mean, so that inputs that never occur in
calibration rows still count.
"""
_BITS, _BLOCK = 8, 32
"""The bits of a factor's numbers, and how many numbers share a scale."""


class Compensator:
    """Corrects one graph of ``bundle`` while it is quantized: call :meth:`remember` before, and :meth:`apply`
    afterwards.

    Each site gets ``rank``; a product that several sites share gets the sum of their ranks. The product that
    computes the logits gets no correction.
    """

    def __init__(self, bundle: Bundle, rank: int, second: Second) -> None:
        self.rank, self._second = rank, second
        self._sites = Counter(site.node for site in bundle.sites.values() if site.weight)
        self._weights: dict[str, tuple[ir.TensorProtocol, bool, str]] = {}
        """Of each product's node the tensor, whether it was transposed on the way, and the name of its
        input.
        """
        self._roots: tuple[str, np.ndarray, np.ndarray] | None = None
        self.errors = np.zeros(2)
        """The squared errors of the products' outputs (of the weights, without rows), before and with the
        correction.
        """
        self.count = 0
        """How many sites are corrected."""

    def remember(self, model: ir.Model) -> None:
        """Keeps references to the float weights of a graph, whose numbers stay in their file."""
        head = find_head(model)
        self._weights = {
            product.node.name: (
                product.weight.const_value,
                product.weight is not product.node.inputs[1],
                product.node.inputs[0].name,
            )
            for product in find_products(model)
            if product.node.name != head
        }

    def apply(self, model: ir.Model, file: TensorFile) -> None:
        """Adds the correction to the products of a quantized graph; appends its codes to ``file``.

        Raises:
            NothingToDo: no product is quantized.
        """
        for node in list(model.graph):
            name = (node.name or "").rpartition("_Q")[0]
            if node.op_type == "MatMulNBits" and name in self._weights:
                tensor, turned, x = self._weights[name]
                weight = tensor.numpy() if turned else tensor.numpy().T
                error = weight.astype(np.float32) - dense(node)
                second = self._second(x)
                factors = self._factors(error, self.rank * max(self._sites[name], 1), second, x)
                down, up = (_Rounded.of(factor, tensor.dtype.numpy()) for factor in (factors.A, factors.B))
                self.errors += [
                    output_error(change, second) for change in (error, error - up.values @ down.values)
                ]
                self.count += max(self._sites[name], 1)
                _add(model.graph, node, {"down": down, "up": up}, file)
        if not self.count:
            raise NothingToDo(
                "no product is quantized", where="--compensate", remedy="leave --compensate out"
            )

    def report(self) -> CompensationReport:
        """Returns the manifest's entry on the correction."""
        before, after = self.errors
        return {
            "rank": self.rank,
            "sites": self.count,
            "error_left": float(np.sqrt(after / before)) if before else 0.0,
        }

    def _factors(self, error: np.ndarray, rank: int, second: np.ndarray | None, key: str) -> Factors:
        """Approximates an error ``[out, in]`` by factors ``B A`` of a rank; ``key`` names the input, so that
        products that read one input share its matrix roots.
        """
        cut = Cut(rank=min(rank, *error.shape))
        if second is None:
            return _normalize(largest(InMemory(error), cut).cut(cut)[0])
        if self._roots is None or self._roots[0] != key:
            self._roots = (key, *_roots(second))
        _, root, inverse = self._roots
        # the best approximation of E S^½ has the least error of the outputs at this rank
        scaled, _ = largest(InMemory(error @ root), cut).cut(cut)
        return _normalize(Factors((scaled.A @ inverse).astype(np.float32), scaled.B))


def _normalize(factors: Factors) -> Factors:
    """Scales the rows of ``A`` to norm 1 without changing the product, so that numbers of ``B`` that share a
    scale matter according to their size.
    """
    norms = np.linalg.norm(factors.A, axis=1)
    norms[norms == 0] = 1
    return Factors(factors.A / norms[:, None], factors.B * norms)


class _Rounded(NamedTuple):
    """A factor ``[rows, columns]`` in codes ``[rows, blocks, block]``, with their scales ``[rows, blocks]``
    and the dequantized numbers.
    """

    codes: np.ndarray
    scales: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, factor: np.ndarray, dtype: np.dtype) -> _Rounded:
        """Rounds a factor to nearest, with scales of this type."""
        x = split_blocks(_BLOCK, factor)
        grid = fresh_grid(x, _BITS, True, dtype)
        q = nearest(x, grid, _BITS)
        return cls(
            q.astype(np.uint8),
            grid.scale.astype(dtype),
            values(q, grid).reshape(len(factor), -1)[:, : factor.shape[1]],
        )


def _add(graph: ir.Graph, node: ir.Node, factors: Mapping[str, _Rounded], file: TensorFile) -> None:
    """Adds ``up (down x)`` to the output of a quantized product of ``x``."""
    x = node.inputs[0]
    y = node.outputs[0]
    name = node.name
    divided = x.producer()
    if divided is not None and divided.name == f"{name.rpartition('_Q')[0]}/scaled":
        # AWQ divides the input of its product; the correction is of the undivided weight
        x = divided.inputs[0]
    result = x
    for role, factor in factors.items():
        stored = [
            add_initializer(graph, file.append(ir.tensor(array, name=f"{name}/{role}_{part}")))
            for part, array in (("codes", factor.codes), ("scales", factor.scales))
        ]
        rows, columns = factor.values.shape
        product = ir.node(
            "MatMulNBits",
            [result, *stored],
            {"N": rows, "K": columns, "bits": _BITS, "block_size": _BLOCK},
            domain="com.microsoft",
            name=f"{name}/{role}",
        )
        result = product.outputs[0]
        result.name = f"{product.name}:0"
        result.type = y.type
        result.shape = None if y.shape is None else ir.Shape([*list(y.shape)[:-1], rows])
        graph.insert_before(node, product)
    total = ir.node("Add", [y, result], name=f"{name}/corrected")
    graph.insert_after(node, total)
    corrected = total.outputs[0]
    corrected.shape, corrected.type, shown = y.shape, y.type, y.name
    # this also replaces the Add's own input, which the next line restores
    y.replace_all_uses_with(corrected, replace_graph_outputs=True)
    total.replace_input_with(0, y)
    y.name = f"{name}/rounded:0"
    corrected.name = shown


def _roots(second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``S^½`` and ``S^-½`` of a damped second moment, in float32."""
    S = second.astype(np.float64)
    sizes, vectors = np.linalg.eigh(S)
    # rounding may give eigenvalues slightly below 0
    sizes = np.maximum(sizes, 0) + _DAMPING * float(np.trace(S)) / len(S)
    return tuple(
        ((vectors * power) @ vectors.T).astype(np.float32) for power in (np.sqrt(sizes), 1 / np.sqrt(sizes))
    )  # type: ignore[return-value]


def dense(node: ir.Node) -> np.ndarray:
    """Returns the weight that a ``MatMulNBits`` multiplies with, ``[out, in]`` in float32, including the
    division before it and the minima of blocks after it.
    """
    out, width, bits, block = (node.attributes.get_int(name) for name in ("N", "K", "bits", "block_size"))
    replaced = node.name.rpartition("_Q")[0]
    codes, scales, *zeros = (value.const_value.numpy() for value in node.inputs[1:] if value is not None)
    grid = stored_grid(bits, scales.reshape(out, -1), zeros[0].reshape(out, -1) if zeros else None)
    q = unpack(codes.reshape(*grid.scale.shape, -1), bits).astype(np.float32)
    rows = values(q, grid).reshape(out, -1)[:, :width]
    for use in node.outputs[0].uses():
        if use.node.name == f"{replaced}/shifted":
            minima = use.node.inputs[1].producer().inputs[1].const_value.numpy().astype(np.float32)
            rows = rows + np.repeat(minima.T, block, axis=1)[:, :width]
    scaled = node.inputs[0].producer()
    if scaled is not None and scaled.name == f"{replaced}/scaled":
        rows = rows * scaled.inputs[1].const_value.numpy().astype(np.float32)
    return rows
