"""Fits the values of an adapter to the inputs that a graph has for them, whoever made the graph: under its
names, in its ranks and dtypes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..adapter_methods import Arrays, Tensors
from ..errors import Unsupported
from ..onnx_graph import DTYPES, FLOATS, GraphFile
from .fields import FIELDS
from .values import split_slot

_CODES = re.compile(r"\.lora_[AB]\.(?:.*\.quant|.*weight_(?:Q4|scales))")
"""In the name of an input for codes of a factor, or for their steps."""
_RANK = {"down": 1, "up": 0}
"""The axis of a factor that is its rank."""


class GraphSlot(NamedTuple):
    """An input of a graph for a value of an adapter; an extent that is open is None. It is ``turned`` if the
    graph transposes it first. One with a default may be left out.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype
    turned: bool
    has_default: bool


def slots_of(graph: GraphFile) -> dict[tuple[str, str], GraphSlot]:
    """Returns the float inputs of a graph that are named as a module's path and a field: a slot's of ours,
    or ``lora_A`` and ``lora_B`` as in the graphs of Olive and onnxruntime-genai.

    Raises:
        Unsupported: a factor's input takes codes of a quantized adapter.
    """
    defaults = {tensor.name for tensor in graph.model.graph.initializer}
    slots = {}
    for value in graph.model.graph.input:
        path, field = split_slot(value.name)
        if _CODES.search(value.name):
            raise Unsupported(
                "the graph takes adapters in four bits, whose grid is the graph's",
                where=graph.path,
                found=value.name,
                remedy="make the graph from an adapter in floats, and keep its products out of the "
                "quantization (nodes_to_exclude of onnxruntime-genai's builder)",
            )
        dtype = DTYPES.get(value.type.tensor_type.elem_type)
        if path and field in FIELDS and dtype in FLOATS:
            axes = value.type.tensor_type.shape.dim
            shape = tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in axes)
            turned = {node.op_type for node in graph.readers.get(value.name, ())} == {"Transpose"}
            slots[path, field] = GraphSlot(value.name, shape, dtype, turned, value.name in defaults)
    return slots


def fit(values: Tensors, path: Path) -> tuple[Arrays, tuple[str, ...]]:
    """Returns the values of an adapter, by the names of our slots, as the inputs of the graph in a file;
    zeros for its other slots that have no default.

    A rank that the graph fixes is filled with zeros, which change nothing.

    Raises:
        Unsupported: the graph has no slots, none for a value, or one that is too small.
    """
    slots = slots_of(GraphFile(path))
    modules = {module for module, _ in slots}
    if not {field for _, field in slots} & {"down", "up"}:
        raise Unsupported(
            "the graph has no inputs for an adapter",
            where=path,
            expected="inputs such as model.layers.0.self_attn.q_proj.lora_A.weight, or .down",
            remedy="make one with adapterpack export --mode inputs, or with Olive's generate-adapter",
        )
    fitted = {}
    for name, value in on_modules(values, modules, path).items():
        module, _, field = name.rpartition(".")
        slot = slots.get((module, field))
        if slot is None:
            raise without_slot([module], modules, path)
        fitted[slot.name] = _in_slot(value, field, slot, path)
    rest = [slot for slot in slots.values() if slot.name not in fitted and not slot.has_default]
    fitted |= {slot.name: np.zeros([extent or 1 for extent in slot.shape], slot.dtype) for slot in rest}
    notes = (f"{len(rest)} inputs of the graph are zeros: the adapter leaves their modules",) if rest else ()
    return fitted, notes


def on_modules(values: Tensors, modules: Collection[str], path: Path) -> Arrays:
    """Returns the values of an adapter, by the names of our slots, under the paths that the graph in a file
    has for their modules: it is found by its path, or by the numbers and the last name in it, since exporters
    rename what lies between (``self_attn``, ``attn``).

    Raises:
        Unsupported: the graph has no such module, or several.
    """
    by_place: dict[Any, list[str]] = {}
    for module in sorted(modules):
        by_place.setdefault(_place(module), []).append(module)
    moved = {}
    without = []
    for name, value in values.items():
        module, _, field = name.rpartition(".")
        near = [module] if module in modules else by_place.get(_place(module), [])
        if len(near) == 1:
            moved[f"{near[0]}.{field}"] = value
        else:
            without.append(module)
    if without:
        raise without_slot(without, modules, path)
    return moved


def without_slot(missing: Iterable[str], modules: Iterable[str], path: Path) -> Unsupported:
    """Makes the error for modules of an adapter for which a graph has no inputs."""
    return Unsupported(
        "the graph has no slot for a part of this adapter",
        where=path,
        found=", ".join(sorted({*missing})[:5]),
        expected=f"modules such as {', '.join(sorted(modules)[:3])}",
        remedy="export a graph for this adapter, or train one of these modules alone",
    )


def _place(module: str) -> tuple[tuple[str, ...], str]:
    """Returns what exporters keep of a module's path: its numbers and its last name."""
    parts = module.split(".")
    return tuple(part for part in parts if part.isdigit()), parts[-1]


def _in_slot(value: np.ndarray, field: str, slot: GraphSlot, path: Path) -> np.ndarray:
    """Returns a value as a slot takes it, filled up with zeros to its rank."""
    axis = _RANK.get(field)
    if slot.turned:
        value = value.T
        axis = None if axis is None else 1 - axis
    wanted = [have if want is None else want for have, want in zip(value.shape, slot.shape, strict=False)]
    room = [want - have for have, want in zip(value.shape, wanted, strict=True)]
    if len(slot.shape) != value.ndim or any(
        free < 0 or (free and place != axis) for place, free in enumerate(room)
    ):
        raise Unsupported(
            "a value of the adapter does not fit its slot in the graph",
            where=f"{path}, {slot.name}",
            expected=f"at most {wanted}",
            found=str(list(value.shape)),
            remedy="where the rank is what differs: adapterpack compose PACK --rank R -o SMALLER",
        )
    return np.ascontiguousarray(np.pad(value, [(0, free) for free in room]).astype(slot.dtype))
