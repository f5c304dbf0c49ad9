"""Replaces the products of a graph with constant weights by products of codes, one weight at a time.

The codes of a weight go to a file at once, to save memory. The product that computes the logits may have its
own setting. Where its weight is also the table of the embedding, the embedding reads the same codes, by
GatherBlockQuantized (:mod:`adapterpack.graph_passes.tied`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir

from ...bundle import ADDED
from ...graph_passes import last_product, look_up_codes
from ...onnx_graph import add_initializer
from .algorithm import ALGORITHMS
from .product import ConstantProduct
from .scheme import Rewriting


def round_products(rewriting: Rewriting) -> int:
    """Rounds the products of a graph to codes, each by its own setting; returns their number."""
    head_weight = _head_weight(rewriting.model)

    def replacement(product: ConstantProduct) -> ir.Graph | None:
        setting = rewriting.head if product.weight is head_weight else rewriting.choose(product.node.name)
        if setting is None:
            return None
        columns = not setting.block_size
        stack = len(product.weight.shape) != 2
        if columns and stack:
            return None
        algorithm = ALGORITHMS["rtn" if stack else setting.algorithm]
        if columns or algorithm.calibrated:
            product = replace(product, second=rewriting.second(product.node.inputs[0].name))
        return product.in_columns() if columns else algorithm.replace(product, setting)

    return replace_products(rewriting, replacement)


def replace_products(rewriting: Rewriting, replacement: Callable[[ConstantProduct], ir.Graph | None]) -> int:
    """Replaces each product by the graph that ``replacement`` returns for it, and leaves it float if that is
    None or has no product on codes; returns the number of replaced products. Products of adapters and
    products whose weight is an input stay float.
    """
    model = rewriting.model
    codes = dict[str, ir.Value]()
    count = 0
    for product in find_products(model):
        rewriting.tick()
        node, weight = product.node, product.weight
        x = node.inputs[0]
        quantized = replacement(product)
        if quantized is None:
            continue
        nodes = list(quantized)
        if weight.name in quantized.initializers:
            continue  # a stack of matrices also stays float
        for name, value in quantized.initializers.items():
            if name not in codes:  # another product with the same weight may have created them
                codes[name] = add_initializer(weight.graph, rewriting.file.append(value.const_value))
            value.const_value = None  # the one-node graph is a reference cycle: free the numbers now
        (y,) = quantized.outputs
        # a node belongs to one graph: take the nodes out of the small graph before adding them here
        quantized.outputs.clear()
        quantized.remove(nodes)
        for new in nodes:
            for index, value in enumerate(new.inputs):
                if value is not None and value.producer() is None:
                    new.replace_input_with(index, x if value.name == x.name else codes[value.name])
        turned = node.inputs[1].producer()
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], nodes, node.outputs, [y])
        # the product was the last reader of the transposed weight
        if turned is not None and not turned.outputs[0].uses():
            turned.graph.remove(turned, safe=True)
            if len(nodes) == 1 and nodes[0].op_type == "MatMulNBits":
                look_up_codes(weight, nodes[0])
        if not weight.uses():
            weight.graph.initializers.pop(weight.name)
        count += 1
    if count:
        model.opset_imports["com.microsoft"] = 1
    return count


def find_products(model: ir.Model) -> list[ConstantProduct]:
    """Returns every product that codes can replace, in a graph and its subgraphs, in order."""
    return [
        ConstantProduct(node, _weight(node), model)
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if _quantizable(node)
    ]


def find_head(model: ir.Model) -> str | None:
    """Returns the name of the node of the product that computes the logits, or None."""
    weight = _head_weight(model)
    return next((product.node.name for product in find_products(model) if product.weight is weight), None)


def _head_weight(model: ir.Model) -> ir.Value | None:
    """Returns the weight of the product that computes the logits, or None."""
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    product = None if logits is None else last_product(logits)
    return _weight(product) if product is not None and _quantizable(product) else None


def _quantizable(node: ir.Node) -> bool:
    return (
        node.op_type == "MatMul"
        and not node.domain
        and not (node.name or "").startswith(ADDED)
        and _weight(node) is not None
    )


def _weight(node: ir.Node) -> ir.Value | None:
    """Returns the constant that a product multiplies with, as it is stored: if a node transposes it first,
    its rows are the product's columns.
    """
    weight = node.inputs[1]
    turned = None if weight is None else weight.producer()
    if (
        turned is not None
        and turned.op_type == "Transpose"
        and list(turned.attributes.get_ints("perm", [1, 0])) == [1, 0]
    ):
        weight = turned.inputs[0]
    return weight if weight is not None and weight.is_initializer() and not weight.is_graph_input() else None
