"""The law that an ONNX graph with the adapter in it computes what the method's functions do."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from adapterpack.adapter_methods import complete
from adapterpack.testing import AdaptedCase, Case, is_float, require

from .layer_fixtures import Stand, stand_of
from .model import in_single

NAME = "block.0.proj"


def onnx_agrees(case: Case) -> None:
    """ONNX Runtime on the emitter's graph, a bank with the base in slot 0: row 0 is the base, row 1 is
    ``run(x)``; the sizes of float32.

    An adapter that does not act everywhere gets every second position. Allowed is 1e-5 of the largest sum of
    magnitudes ``|W| |x|``: some ten roundings of the largest term.
    """
    import onnx_ir as ir

    from adapterpack.graph_passes.attach import MODES, AttachPlan, with_fields
    from adapterpack.graph_passes.sites import find_sites
    from adapterpack.slots.values import ARRAYS

    weight, x = case.weight.astype(np.float32), case.x[:2].astype(np.float32)
    bias = None if case.bias is None else case.bias.astype(np.float32)
    trained = {
        name: value
        for name, value in case.trained(np.float32).items()
        if name in {**case.shared(), **case.own()}
    }
    site = AdaptedCase(case, trained, weight, bias).site
    params = complete(case.method, case.config, trained, site)
    form = case.method.normal_form(case.config, params, site)
    arrays = {
        f"{NAME}.{field}": value for field, value in ARRAYS[case.method.kind](form, case.site, None).items()
    }
    model, positional = _layer(ir, weight, bias), case.config.acts is not None
    found = find_sites(model, lambda node: NAME)
    linear = {
        path: dataclasses.replace(site, entry=site.input, positional=positional)
        for path, site in found.items()
    }
    sites = with_fields(linear, [arrays])
    rank = max((value.shape[1] for name, value in arrays.items() if name.endswith("down")), default=1)
    MODES["bank"](model, AttachPlan([], [arrays], sites, {}, 2, rank))
    session = _session(ir, model)
    feeds, acting = {"input_ids": x, "adapter_ids": np.array([0, 1])}, np.arange(x.shape[1]) % 2 == 0
    if positional:
        feeds["adapter_positions"] = np.tile(acting, (2, 1))
    outputs = session.run(None, feeds)[0]
    wide = {
        name: value.astype(np.float64) if value.dtype == np.float32 else value
        for name, value in params.items()
    }
    layer = AdaptedCase(
        case, wide, weight.astype(np.float64), None if bias is None else bias.astype(np.float64)
    )
    exact = x.astype(np.float64)
    base, expected = layer.base(exact), layer.run(exact)
    if positional:
        expected = np.where(acting[:, None], expected, base)
    size = np.abs(expected).max() + (np.abs(exact) @ np.abs(layer.weight).T).max()
    for row, right in ((0, base), (1, expected)):
        error = float(np.abs(outputs[row] - right[row]).max())
        require(error <= 1e-5 * size, f"row {row} is off by {error:.2g}, of sums of size {size:.2g}")


def folded_onnx_agrees(case: Case) -> None:
    """ONNX Runtime on a graph of the one layer, its weights folded and rounded to float32, gives ``run(x)``:
    within 1e-5 of the largest entry and of ``|W| |x|``.
    """
    import onnx_ir as ir

    weight, bias = case.weight.astype(np.float32), None if case.bias is None else case.bias.astype(np.float32)
    wide = {name: v.astype(np.float64) if is_float(v) else v for name, v in case.trained(np.float32).items()}
    folded, moved = AdaptedCase(
        case, wide, weight.astype(np.float64), None if bias is None else bias.astype(np.float64)
    ).fold()
    folded, moved = folded.astype(np.float32), None if moved is None else moved.astype(np.float32)
    stand = stand_of(case)
    x = stand.x(case)
    model = _layer(ir, folded, moved) if stand.node is None else _node(ir, stand, folded, moved)
    found = _session(ir, model).run(None, {"input_ids": x.astype(np.float32) if is_float(x) else x})[0]
    expected, size = in_single(case, everywhere=True)
    error = float(np.abs(found - expected).max())
    require(error <= 1e-5 * size, f"the graph is off by {error:.2g}, of sums of size {size:.2g}")


def _session(ir: Any, model: Any) -> Any:
    """ONNX Runtime with a graph, on one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _node(ir: Any, stand: Stand, weight: np.ndarray, bias: np.ndarray | None) -> Any:
    """A graph of one node: x first, but an index second."""
    assert stand.node is not None
    operator, attributes = stand.node
    is_lookup = operator == "Gather"
    x = ir.Value(
        name="input_ids",
        shape=ir.Shape(["batch", "tokens"] if is_lookup else ["batch", "tokens", len(weight)]),
        type=ir.TensorType(ir.DataType.INT64 if is_lookup else ir.DataType.FLOAT),
    )
    floats = ir.TensorType(ir.DataType.FLOAT)
    stored = {
        "weight": np.ascontiguousarray(stand.stored(weight)),
        **({} if bias is None else {"bias": bias}),
    }
    constants = [
        ir.Value(name=name, shape=ir.Shape(array.shape), type=floats, const_value=ir.tensor(array, name=name))
        for name, array in stored.items()
    ]
    node = ir.node(
        operator, [*constants, x] if is_lookup else [x, *constants], attributes=attributes, name="layer"
    )
    node.outputs[0].name, node.outputs[0].type = "layer:0", floats
    node.outputs[0].shape = ir.Shape(["batch", "tokens", weight.shape[1] if is_lookup else len(weight)])
    return ir.Model(
        ir.Graph(
            [x], [node.outputs[0]], nodes=[node], initializers=constants, opset_imports={"": 20}, name="one"
        ),
        ir_version=10,
    )


def _layer(ir: Any, weight: np.ndarray, bias: np.ndarray | None) -> Any:
    """A graph of one linear layer."""
    floats = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="input_ids", shape=ir.Shape(["batch", "tokens", weight.shape[1]]), type=floats)
    stored = {"weight": np.ascontiguousarray(weight.T), **({} if bias is None else {"bias": bias})}
    constants = {
        name: ir.Value(
            name=name, shape=ir.Shape(array.shape), type=floats, const_value=ir.tensor(array, name=name)
        )
        for name, array in stored.items()
    }
    nodes = [ir.node("MatMul", [x, constants["weight"]], name="product")]
    if bias is not None:
        nodes.append(ir.node("Add", [nodes[0].outputs[0], constants["bias"]], name="sum"))
    for node in nodes:
        node.outputs[0].name = f"{node.name}:0"
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(["batch", "tokens", weight.shape[0]]), floats
    graph = ir.Graph(
        [x],
        [nodes[-1].outputs[0]],
        nodes=nodes,
        initializers=list(constants.values()),
        opset_imports={"": 20},
        name="one",
    )
    return ir.Model(graph, ir_version=10)
