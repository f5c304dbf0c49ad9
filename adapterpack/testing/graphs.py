"""The laws of a method in a graph: what the emitter makes of its normal form, run by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..runtime.blocks import block_arrays
from ..runtime.bundle import ADAPTER_IDS, MappedSite
from ..runtime.slots import Values, padded, stacked
from .case import Case, adapted, layer_of, require

FLOAT32 = 1e-5
"""Of the largest output: what float32 rounds away in a few products of ten numbers."""


def onnx_equals_numpy(case: Case) -> None:
    """Rows of a bank, of the base's slot and of the adapter's, give ``base(x)`` and ``run(x)``: within 1e-5 of the largest, in float32."""
    params = case.trained()
    fields = block_arrays(case.method.attach(case.config, params, case.site), case.site.out_features)
    x = case.x.astype(np.float32)
    found = _run(case, {f"{case.site.path}.{field}": array for field, array in fields.items()}, x, np.array([0, 1, 0]))
    base, changed = layer_of(case.weight, case.bias)(case.x), adapted(case, params, case.weight, case.bias, case.x)
    for row, expected in enumerate((base[0], changed[1], base[2])):
        error = float(np.abs(found[row] - expected).max())
        require(error <= FLOAT32 * max(1.0, float(np.abs(expected).max())), f"row {row} of the graph is off by {error:.1e}")


def _run(case: Case, values: Values, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The output of one linear layer with the block's slots behind it, for rows that choose."""
    import onnx_ir as ir  # noqa: PLC0415 - as torch elsewhere: only where it is needed
    import onnxruntime as ort  # noqa: PLC0415

    from ..export.emit import Emitter, ids_input, slot_input  # noqa: PLC0415

    site, kind = case.site, ir.TensorType(ir.DataType.FLOAT)
    fields = tuple(sorted(name.rpartition(".")[2] for name in values))
    mapped = MappedSite(site.path, "layer", "x", "y", "weight", None, "in_out", site.in_features, site.out_features, 3, fields=fields,
                        entry="x")
    bank = stacked(padded(one, {site.path: mapped}, site.out_features + 3, {}) for one in ({}, values))
    entry = ir.Value(name="x", shape=ir.Shape(["batch", "sequence", site.in_features]), type=kind)

    def constant(name: str, array: Any) -> Any:
        held = ir.tensor(np.float32(array), name=name)
        return ir.Value(name=name, shape=held.shape, type=kind, const_value=held)

    weight = constant("weight", case.weight.T)
    bias = constant("bias", np.zeros(site.out_features) if case.bias is None else case.bias)
    product = ir.node("MatMul", [entry, weight], name="layer")
    total = ir.node("Add", [product.outputs[0], bias], name="bias")
    y = total.outputs[0]
    y.name, y.type, y.shape = "y", kind, ir.Shape(["batch", "sequence", site.out_features])
    graph = ir.Graph([entry], [y], nodes=[product, total], initializers=[weight, bias], opset_imports={"": 20}, name="block")
    model = ir.Model(graph, ir_version=10)
    emitter, chosen = Emitter(model, batched=True), ids_input(model, "batch")
    slots = {field: emitter.gather(mapped, field, slot_input(model, f"{site.path}.{field}", bank[f"{site.path}.{field}"],
                                                             list(bank[f"{site.path}.{field}"].shape)), chosen) for field in fields}
    emitter.site(mapped, slots)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x, ADAPTER_IDS: ids})[0]
    return result
