"""Lays a graph's weights out in files that a browser downloads, keeps and resumes one by one, the bank's
slots apart from the base.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
from onnx_ir.external_data import convert_tensors_to_external

_ALIGNMENT = 4096
"""Every tensor begins at a multiple of so many bytes."""


class SlotPlace(NamedTuple):
    """Where a slot's numbers are, those of all adapters: ``shape`` ``[slots, ...]`` in float32 or the slot's
    own type.
    """

    file: str
    offset: int
    shape: tuple[int, ...]


def split(graph: Path, slots: Collection[str], required: Collection[str], most: int) -> dict[str, SlotPlace]:
    """Moves a graph's large tensors to files of at most ``most`` bytes next to it, a larger tensor alone in
    one, and the ``slots`` to files of their own; the file in which the weights lay is left as it is. The
    ``required`` inputs lose their defaults: ONNX Runtime Web feeds no input that has one.

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
                for value in same:
                    value.const_value = _at(value.const_value, tensor, graph.parent)
    ir.save(model, graph)
    return {
        value.name: SlotPlace(
            value.const_value.location, value.const_value.offset or 0, tuple(value.const_value.shape)
        )
        for value in bank
    }


def data_files(graph: Path) -> set[str]:
    """The names of the files that a graph reads its weights from."""
    model = ir.load(graph)
    tensors = (value.const_value for inner in model.graphs() for value in inner.initializers.values())
    return {Path(tensor.location).name for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def _at(tensor: ir.TensorProtocol, place: ir.ExternalTensor, folder: Path) -> Any:
    """A tensor with its numbers where ``place`` has them: several may share the same bytes, as tied
    embeddings do.
    """
    return ir.ExternalTensor(
        place.location,
        place.offset,
        place.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        base_dir=folder,
    )


def _parts(groups: Iterable[list[Any]], most: int) -> Iterator[list[list[Any]]]:
    """The groups of values on the same bytes in order, as many together as fit."""
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
