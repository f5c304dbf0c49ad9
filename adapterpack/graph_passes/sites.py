"""Maps module paths to nodes of the graph, before any fusion, by the scopes that exporters record on
nodes.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterable

import onnx_ir as ir

from ..adapter_methods import PROMPT
from ..bundle import MappedSite
from ..onnx_graph import inputs_of, only_reader, values_of
from ..slots import DEFAULT
from .experts import expert_product

Scope = Callable[[ir.Node], str | None]
"""node -> the path of the module that made it, or None."""


def torch_scope(node: ir.Node) -> str | None:
    """Returns the module path that torch.onnx records on a node: the last scope before the node's own
    name.
    """
    noted = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    scopes = ast.literal_eval(noted) if noted else []
    return scopes[-2] if len(scopes) >= 2 else None


def onnxscript_scope(node: ir.Node) -> str | None:
    """Returns the module path that onnxscript's module builder records on a node: its scopes, joined."""
    noted = node.metadata_props.get("pkg.onnxscript.name_scopes")
    return ".".join(part for part in ast.literal_eval(noted) if part) if noted else None


def find_sites(model: ir.Model, scope: Scope) -> dict[str, MappedSite]:
    """Returns every module of the graph that can have slots: a MatMul (with or without an Add for its bias)
    or a plain Gemm on a constant weight, a lookup in a constant table, a convolution that splits an image
    into patches, and a product with a stack of experts, whose path is the parameter's.

    A module that appears more than once (a shared layer) has the site of its first use, if :func:`later_uses`
    has the others, and else none.
    """
    every = uses_of_modules(model, scope)
    times = Counter(site.path for site in every)
    later = later_uses(model, every)
    found: dict[str, MappedSite] = {}
    for site in every:
        if times[site.path] == 1 or site.path in later:
            found.setdefault(site.path, site)
    return found


def later_uses(model: ir.Model, every: Iterable[MappedSite]) -> dict[str, list[MappedSite]]:
    """Returns the uses after the first of each linear module that the graph uses several times, always with
    the same weight and on as many rows (DeBERTa's queries are also those of its positions).
    """
    values = values_of(model.graph)
    by_path = dict[str, list[MappedSite]]()
    for site in every:
        by_path.setdefault(site.path, []).append(site)

    def alike(site: MappedSite) -> tuple[object, ...]:
        return site.kind, site.weight, site.bias, str(values[site.input].shape[0])

    return {
        path: uses[1:]
        for path, uses in by_path.items()
        if len(uses) > 1 and uses[0].kind == "linear" and len(set(map(alike, uses))) == 1
    }


def uses_of_modules(model: ir.Model, scope: Scope) -> list[MappedSite]:
    """Returns every use of such a module, in graph order."""
    paths = ((node, scope(node)) for node in model.graph if node.op_type in _SITES)
    uses = [_SITES[node.op_type](path, node) for node, path in paths if path]
    return [site for site in uses if site is not None]


def _extents(weight: ir.Value, axes: int) -> tuple[int, ...] | None:
    """Returns the shape of a constant weight that has so many axes; None for any other value."""
    constant = ir.convenience.get_const_tensor(weight) if weight.is_initializer() else None
    if constant is None or len(constant.shape) != axes:
        return None
    return tuple(int(extent) for extent in constant.shape)


def _linear(path: str, node: ir.Node) -> MappedSite | None:
    x, weight = node.inputs[0], node.inputs[1]
    wide = _extents(weight, 2)
    if wide is None or x.shape is None:
        return _experts(path, node)
    attributes = node.attributes
    if (
        attributes.get_int("transA", 0)
        or attributes.get_float("alpha", 1.0) != 1
        or attributes.get_float("beta", 1.0) != 1
    ):
        return None  # only a Gemm that computes x W + b is a linear layer
    out_in = attributes.get_int("transB", 0) == 1
    in_features, out_features = (wide[1], wide[0]) if out_in else wide
    output = node.outputs[0]
    bias = _third(node)
    if node.op_type == "MatMul":
        output, bias = with_bias(output, out_features)
    return MappedSite(
        path,
        node.name,
        x.name,
        output.name,
        weight.name,
        None if bias is None else bias.name,
        "out_in" if out_in else "in_out",
        in_features,
        out_features,
        len(x.shape),
        dtype=float_type(output),
    )


def _third(node: ir.Node) -> ir.Value | None:
    """Returns the bias of a Gemm or a convolution, if it has one."""
    return node.inputs[2] if len(node.inputs) > 2 else None


def with_bias(product: ir.Value, out_features: int) -> tuple[ir.Value, ir.Value | None]:
    """Returns the value after the Add of a bias, and that bias, if the Add is the only reader of the product;
    else the product and None.
    """
    node = only_reader(product)
    if node is not None and node.op_type == "Add" and not product.is_graph_output():
        addend = node.inputs[1] if node.inputs[0] is product else node.inputs[0]
        if (
            addend.is_initializer()
            and addend.const_value is not None
            and tuple(addend.const_value.shape) == (out_features,)
        ):
            return node.outputs[0], addend
    return product, None


def _lookup(path: str, node: ir.Node) -> MappedSite | None:
    """Returns the site of a table lookup by ids ``[batch, tokens]``, which an adapter treats as a linear
    layer with one-hot inputs.
    """
    table, ids = node.inputs
    extents = _extents(table, 2)
    if extents is None or ids.shape is None or len(ids.shape) != 2 or node.attributes.get_int("axis", 0) != 0:
        return None
    entries, width = extents
    return MappedSite(
        path,
        node.name,
        ids.name,
        node.outputs[0].name,
        table.name,
        None,
        "in_out",
        entries,
        width,
        2,
        kind="lookup",
        dtype=float_type(node.outputs[0]),
    )


def _patches(path: str, node: ir.Node) -> MappedSite | None:
    """Returns the site of a convolution whose kernels do not overlap: a linear layer on every patch
    ``[channels * height * width]``.
    """
    x, weight = node.inputs[:2]
    extents = _extents(weight, 4)
    attributes = node.attributes
    if extents is None or x.shape is None:
        return None
    out, channels, *kernel = extents
    padding = attributes.get_string("auto_pad", "NOTSET")
    plain = attributes.get_int("group", 1) == 1 and padding in {"NOTSET", "VALID"}
    apart = set(attributes.get_ints("dilations", [1, 1])) == {1}
    aside = apart and list(attributes.get_ints("strides", [1, 1])) == kernel
    whole = all(
        isinstance(extent, int) and extent % size == 0
        for extent, size in zip(list(x.shape)[2:], kernel, strict=True)
    )
    if not (plain and aside and whole) or any(attributes.get_ints("pads", [0])):
        return None
    bias = _third(node)
    return MappedSite(
        path,
        node.name,
        x.name,
        node.outputs[0].name,
        weight.name,
        None if bias is None else bias.name,
        "out_in",
        channels * kernel[0] * kernel[1],
        out,
        len(x.shape),
        kind="patches",
        dtype=float_type(node.outputs[0]),
    )


SWAPPED = "adapterpack.swapped"
"""A note on a stack ``[experts, in, out]`` of which the model does not say how it lies: adapters take it for
``[experts, out, in]``.
"""


def _experts(path: str, node: ir.Node) -> MappedSite | None:
    """Returns the site of a stack of experts, whose constant has the name of its parameter."""
    product = expert_product(node)
    if product is None or f"{path}." not in (name := product.stack.name or ""):
        return None
    count, width, out = _extents(product.stack, 3) or (0, 0, 0)
    return MappedSite(
        f"{path}.{name.rpartition('.')[2]}",
        node.name,
        product.x.name,
        node.outputs[0].name,
        "",
        None,
        "out_in" if SWAPPED in product.stack.metadata_props else "in_out",
        width,
        out,
        len(product.x.shape),
        kind="experts",
        dtype=float_type(product.x),
        stack=count,
    )


def prompt_site(model: ir.Model) -> dict[str, MappedSite]:
    """Returns the site of the virtual tokens before the rows of a graph that was exported with room for them;
    nothing for other graphs.
    """
    embeds = inputs_of(model.graph).get("virtual")
    if embeds is None:
        return {}
    joined = next(use.node for use in embeds.uses() if use.node.op_type == "Concat")
    width = int(embeds.shape[-1])
    output = joined.outputs[0]
    return {
        PROMPT: MappedSite(
            PROMPT,
            joined.name,
            output.name,
            output.name,
            "",
            None,
            "in_out",
            width,
            width,
            3,
            kind="prompt",
            dtype=float_type(embeds),
        )
    }


def float_type(value: ir.Value) -> str:
    """Returns the dtype of a value of the graph; float32 where the exporter records none."""
    return DEFAULT if value.dtype is None else str(value.dtype.numpy().name)


_SITES: dict[str, Callable[[str, ir.Node], MappedSite | None]] = {
    "MatMul": _linear,
    "Gemm": _linear,
    "Concat": _experts,
    "Gather": _lookup,
    "Conv": _patches,
}
"""Operator -> what makes a site of a node, or says that it is none."""
