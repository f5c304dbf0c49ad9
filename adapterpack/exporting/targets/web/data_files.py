"""Splits a graph's weights into files that a browser downloads, caches and resumes one by one, with the
bank's slots apart from the base.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
from onnx_ir.external_data import convert_tensors_to_external

from ....onnx_graph import part_of

_ALIGNMENT = 4096
"""Every tensor begins at a multiple of this many bytes."""


class SlotPlace(NamedTuple):
    """The place of a slot's values in a data file, for all adapters: ``shape`` ``[slots, ...]`` in float32 or
    the slot's own type.
    """

    file: str
    offset: int
    shape: tuple[int, ...]


def split(graph: Path, slots: Collection[str], required: Collection[str], most: int) -> dict[str, SlotPlace]:
    """Moves a graph's large tensors to files of at most ``most`` bytes next to it (a larger tensor gets its
    own file), and the ``slots`` to separate files; leaves the old data file as it is. The ``required`` inputs
    lose their defaults: ONNX Runtime Web feeds no input that has a default.

    Returns:
        Where each slot is; a slot without a number has no place.
    """
    model = ir.load(graph)
    for name in required:
        model.graph.initializers.pop(name).const_value = None
    values = [
        value
        for inner in model.graphs()
        for value in inner.initializers.values()
        if value.const_value is not None
    ]
    bank = [value for value in values if value.name in slots and value.const_value.nbytes]
    weights = [
        value
        for value in values
        if value.name not in slots and isinstance(value.const_value, ir.ExternalTensor)
    ]
    shared: dict[object, list[Any]] = {}
    for value in weights:
        shared.setdefault(
            (value.const_value.location, value.const_value.offset, value.const_value.length), []
        ).append(value)
    for kind, groups in (("", list(shared.values())), ("-bank", [[value] for value in bank])):
        for number, part in enumerate(_parts(groups, most), 1):
            name = f"{graph.stem}{kind}-{number}.onnx.data"
            tensors = convert_tensors_to_external(
                [same[0].const_value for same in part],
                graph.parent,
                name,
                alignment=_ALIGNMENT,
                align_threshold=0,
            )
            for same, tensor in zip(part, tensors, strict=True):
                for value in same:  # tensors may share bytes, as tied embeddings do
                    own = value.const_value
                    value.const_value = part_of(tensor, own.name, own.shape.numpy(), own.dtype)
    ir.save(model, graph)
    return {
        value.name: SlotPlace(
            value.const_value.location, value.const_value.offset or 0, tuple(value.const_value.shape)
        )
        for value in bank
    }


def data_files(graph: Path) -> set[str]:
    """Returns the names of the files from which a graph reads its weights."""
    model = ir.load(graph)
    tensors = (value.const_value for inner in model.graphs() for value in inner.initializers.values())
    return {Path(tensor.location).name for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def _parts(groups: Iterable[list[Any]], most: int) -> Iterator[list[list[Any]]]:
    """Yields batches of groups, in order, that fit together; a group holds the values on the same bytes."""
    part: list[list[Any]] = []
    used = 0
    for same in groups:
        room = -(-same[0].const_value.nbytes // _ALIGNMENT) * _ALIGNMENT
        if part and used + room > most:
            yield part
            part, used = [], 0
        part.append(same)
        used += room
    if part:
        yield part
