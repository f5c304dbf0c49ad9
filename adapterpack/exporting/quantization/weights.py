"""Quantizes the products of a graph with constant weights to MatMulNBits, one weight at a time, by ONNX Runtime's own quantizer.

The quantizer wants a whole model in memory. Here it gets models of one node, so that no more than one weight is in memory at a time; what
it makes of a weight goes to a file at once.

The product that gives the logits may have a scheme of its own. Where its weight is the table of the embedding, the embedding reads the
same codes, by GatherBlockQuantized: see :mod:`.tied`.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...bundle.manifest import ADDED
from ...engine_graph.derive import last_product
from ...onnx_graph.save import save_graph
from .schemes import FLOAT, Scheme
from .tied import look_up_codes, share_bytes


def quantize_file(path: Path, scheme: Scheme, head: Scheme | None = None) -> int:
    """Quantizes the graph at ``path`` and replaces its file and its data; returns the number of quantized products.

    ``head`` is the scheme of the product that gives the logits, by default that of the others. Products of adapters stay float, and so
    do those whose weight is an input of the graph.
    """
    model, data = ir.load(path), f"{path.name}.data"
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=path.parent) as name:
        scratch = Path(name)
        count = _quantize(model, scheme, scheme if head is None else head, _TensorFile(scratch / "tensors"))
        save_graph(model, scratch / path.name)
        share_bytes(scratch / path.name)
        for file in (data, path.name):
            path.with_name(file).unlink(missing_ok=True)
            if (scratch / file).exists():  # a graph of small tensors has no data file
                (scratch / file).rename(path.with_name(file))
    return count


class _TensorFile:
    """A file of tensors, one after another."""

    def __init__(self, path: Path) -> None:
        self.path, self._end = path, 0

    def append(self, tensor: Any) -> Any:
        """Writes a tensor to the end of the file, and returns it as external data."""
        with self.path.open("ab") as file:
            length = file.write(tensor.tobytes())
        stored = ir.ExternalTensor(self.path.name, self._end, length, tensor.dtype, shape=tensor.shape, name=tensor.name,
                                   base_dir=self.path.parent)
        self._end += length
        return stored


def _quantize(model: Any, scheme: Scheme, head: Scheme, file: _TensorFile) -> int:
    codes: dict[str, Any] = {}
    head_weight = _head_weight(model)
    count = 0
    for node in [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if _quantizable(node)]:
        x, weight = node.inputs[0], _weight(node)
        chosen = head if weight is head_weight else scheme
        if chosen is FLOAT:
            continue
        quantized = _by_onnxruntime(_alone(node, model), chosen)
        nodes = list(quantized)
        if all(new.op_type != "MatMulNBits" for new in nodes):
            continue  # a stack of matrices
        for name, value in quantized.initializers.items():
            if name not in codes:  # a product with the same weight may have made them
                codes[name] = _initializer(file.append(value.const_value))
                weight.graph.register_initializer(codes[name])
            value.const_value = None  # the graph of one node is a circle, which is collected later
        (y,) = quantized.outputs
        quantized.outputs.clear()
        quantized.remove(nodes)
        for new in nodes:
            for index, value in enumerate(new.inputs):
                if value is not None and value.producer() is None:
                    new.replace_input_with(index, x if value.name == x.name else codes[value.name])
        turned = node.inputs[1].producer()
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], nodes, node.outputs, [y])
        if turned is not None and not turned.outputs[0].uses():
            turned.graph.remove(turned, safe=True)
            look_up_codes(weight, next(new for new in nodes if new.op_type == "MatMulNBits"))
        if not weight.uses():
            weight.graph.initializers.pop(weight.name)
        count += 1
    if count:
        model.opset_imports["com.microsoft"] = 1
    return count


def _head_weight(model: Any) -> Any:
    """The weight of the product that gives the logits, or None."""
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    product = None if logits is None else last_product(logits)
    return _weight(product) if product is not None and _quantizable(product) else None


def _quantizable(node: Any) -> bool:
    return node.op_type == "MatMul" and not node.domain and not (node.name or "").startswith(ADDED) and _weight(node) is not None


def _weight(node: Any) -> Any:
    """The constant that a product multiplies with, as it is stored: a matrix that is transposed first has its rows as columns."""
    weight = node.inputs[1]
    turned = None if weight is None else weight.producer()
    if turned is not None and turned.op_type == "Transpose" and list(turned.attributes.get_ints("perm", [1, 0])) == [1, 0]:
        weight = turned.inputs[0]
    return weight if weight is not None and weight.is_initializer() and not weight.is_graph_input() else None


def _alone(node: Any, model: Any) -> Any:
    """A product as the only node of a model, with its weight in memory."""
    x, weight = node.inputs[0], _weight(node)
    numbers = weight.const_value.numpy()
    if weight is not node.inputs[1]:
        numbers = np.ascontiguousarray(numbers.T)
    tensor = ir.Tensor(numbers, dtype=weight.const_value.dtype, name=weight.name)
    inputs = [ir.Value(name=x.name, shape=x.shape, type=x.type), _initializer(tensor)]
    product = ir.Node("", "MatMul", inputs, name=node.name)
    (y,) = product.outputs
    y.name, y.shape, y.type = node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type
    graph = ir.Graph(inputs[:1], [y], nodes=[product], initializers=inputs[1:], opset_imports=model.opset_imports, name="product")
    return ir.to_proto(ir.Model(graph, ir_version=model.ir_version))


def _by_onnxruntime(proto: Any, scheme: Scheme) -> Any:
    """The quantized graph of a model."""
    quantizer = _quantizer()(proto, bits=scheme.bits, block_size=scheme.block_size, is_symmetric=scheme.symmetric,
                             op_types_to_quantize=("MatMul",))
    quantizer.process()
    return ir.from_proto(quantizer.model.model).graph


def _initializer(tensor: Any) -> Any:
    return ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


@functools.cache
def _quantizer() -> Any:
    """ONNX Runtime's quantizer; its import makes the whole process log everything, which is undone."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # noqa: PLC0415 - imports onnx tooling

    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    return MatMulNBitsQuantizer
