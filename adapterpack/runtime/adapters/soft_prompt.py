"""Computes the keys and values of virtual embeddings: runs them once through a decoder's graph, cut after its
embedding table.

In a causal model the first tokens do not depend on later ones, so their keys and values never change and can
be kept in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ...bundle import ADAPTER_IDS, ADAPTER_POSITIONS, GRAPH, PRESENT, empty_caches
from ...errors import BaseMismatch, Unsupported
from ...onnx_graph import in_float32
from ..ort import TYPES

_LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})
_RESHAPED = frozenset({"Reshape", "Identity", "Cast"})
"""Operators through which some models pass token ids before the lookup."""
_EMBEDS = "adapterpack/virtual_embeddings"


def prefill(folder: Path, inputs: Mapping[str, Any], embeds: np.ndarray) -> np.ndarray:
    """Returns the keys and values ``[layers, 2, heads, n, head_dim]`` of virtual embeddings ``[n, in]``,
    computed by the base model in ``folder``; ``inputs`` are the inputs of its graph.

    Raises:
        BaseMismatch: the embeddings are of another width than the graph's.
        Unsupported: the graph looks its tokens up at several places.
    """
    model = ir.load(folder / GRAPH)
    _cut(model, embeds.shape[1], folder)
    in_float32(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it runs once
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    count = embeds.shape[0]
    # The token ids are all 0, because the embeddings replace their lookup and only their shape counts.
    row = np.arange(count, dtype=np.int64)[None]
    feeds = {
        "input_ids": 0 * row,
        "attention_mask": 0 * row + 1,
        "position_ids": row,
        ADAPTER_IDS: np.zeros(1, np.int64),
    }
    feeds[ADAPTER_POSITIONS] = np.ones((1, count), bool)
    feeds[_EMBEDS] = embeds[None]
    feeds |= empty_caches(inputs, 1)
    types = {value.name: TYPES[value.type] for value in session.get_inputs() if value.type in TYPES}
    fed = {name: array.astype(types[name]) for name, array in feeds.items() if name in types}
    names = [value.name for value in session.get_outputs() if value.name.startswith(PRESENT)]
    cache = dict(zip(names, session.run(names, fed), strict=True))
    layers = range(len(names) // 2)
    return np.stack(
        [np.stack([cache[f"{PRESENT}{layer}.{side}"][0] for side in ("key", "value")]) for layer in layers]
    ).astype(np.float32)


def _cut(model: Any, width: int, where: Path) -> None:
    """Replaces the result of the token lookup by a new graph input for embeddings."""
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    lookups = _lookups(ids)
    if len(lookups) != 1:
        raise Unsupported(
            "virtual embeddings need a graph that looks its tokens up at one place",
            where=where,
            found=len(lookups),
            expected="one Gather of input_ids",
            remedy="use prefix_tuning, whose keys and values need no graph",
        )
    (looked_up,) = lookups[0].outputs
    table = lookups[0].inputs[0].shape
    if lookups[0].op_type == "Gather" and table is not None and table[-1] != width:
        raise BaseMismatch(
            "the embeddings are of another width than the model's",
            where=where,
            expected=table[-1],
            found=width,
            remedy="use the base that the pack names",
        )
    embeds = ir.Value(
        name=_EMBEDS,
        shape=ir.Shape([1, "virtual", width]),
        type=ir.TensorType(looked_up.dtype or ir.DataType.FLOAT),
    )
    for node, index in list(looked_up.uses()):
        node.replace_input_with(index, embeds)
    model.graph.inputs.append(embeds)


def _lookups(ids: Any) -> list[Any]:
    """Returns the nodes that look up token ids in an embedding table."""
    found = []
    for node, index in ids.uses():
        if node.op_type in _LOOKUPS and index == 1:
            found.append(node)
        elif node.op_type in _RESHAPED and index == 0:
            found += _lookups(node.outputs[0])
    return found
