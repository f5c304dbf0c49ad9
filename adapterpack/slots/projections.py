"""Runs the key and value projections of a graph on a prompt, by extracting the part of the graph between two
values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ..bundle import Heads, SiteMap
from ..errors import FormatError, Unsupported
from ..onnx_graph import PRODUCTS, in_float32
from .precision import DEFAULT
from .prompt_kv import PROJECTION


def heads_at(sites: SiteMap, path: str) -> Heads:
    """Returns the attention at that path.

    Raises:
        Unsupported: the graph has no slots for prompts there.
    """
    site = sites.get(f"{path}.{PROJECTION}")
    if site is None or site.heads is None:
        raise Unsupported(
            "the graph has no place for a prompt that this attention looks at",
            where=path,
            expected=(
                "an attention whose queries, keys and values are known, and an output projection of its own"
            ),
            remedy=(
                "export a bundle with this adapter among the packs, choose another --frontend, or run it "
                "under torch"
            ),
        )
    return site.heads


def project(model: Any, heads: Heads, prompt: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the keys, without positions, and values ``[n, key heads, head_dim]`` that the base computes
    from a prompt ``[n, width]``. ``dtype`` is the graph's float type there, in case its values carry no type.

    Raises:
        FormatError: the graph lacks values that the site map names.
    """
    by_name = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    if missing := sorted({heads.keys, heads.values, *(heads.norm or ())} - by_name.keys()):
        raise FormatError(
            "the graph has not what its site map says", found=", ".join(missing), remedy="export again"
        )
    shape = (1, len(prompt), heads.key_heads, heads.width)
    keys, values = (
        _between(model, _read(by_name[name]), by_name[name], prompt[None], dtype).reshape(shape)
        for name in (heads.keys, heads.values)
    )
    if heads.norm is not None:
        into, out = (by_name[name] for name in heads.norm)
        keys = _between(model, into, out, keys, dtype)
    return keys[0], values[0]


def _read(product: Any) -> Any:
    """Returns the input of the linear layer that computes a value, directly or through a sum and a split."""
    node = product.producer()
    while node is not None and node.op_type not in PRODUCTS:
        node = next(
            (value.producer() for value in node.inputs if value is not None and value.producer() is not None),
            None,
        )
    if node is None:
        raise FormatError("the graph has no linear layer there", found=product.name, remedy="export again")
    return node.inputs[0]


def _between(model: Any, start: Any, end: Any, array: np.ndarray, dtype: str) -> np.ndarray:
    """Computes the value ``end`` with ``array`` as the value ``start``, in float32 whatever the type of the
    graph.
    """
    graph = in_float32(
        ir.Model(ir.convenience.extract(model.graph, [start], [end]), ir_version=model.ir_version)
    ).graph
    for value in (*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)):
        value.shape = None
    (entry,) = graph.inputs
    if entry.dtype is not None:
        dtype = entry.dtype.numpy().name
    array = array.astype(DEFAULT if dtype == "bfloat16" else dtype)
    entry.shape = ir.Shape(array.shape)
    entry.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    # a serialized model cannot refer to weight files, so the weights move into it
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(
                value.const_value.numpy(), dtype=value.const_value.dtype, name=value.name
            )
    alone = ir.Model(graph, ir_version=model.ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        ir.to_proto(alone).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    result: np.ndarray = session.run(None, {entry.name: np.ascontiguousarray(array)})[0]
    return result.astype(np.float32)
