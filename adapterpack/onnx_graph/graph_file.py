"""Opens an ONNX model on disk: loads its nodes, and locates its initializers in the files without loading
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from ..errors import FormatError, Unsupported, storage_errors
from ..io import count_of
from ..library_errors import library_errors
from ..paths import StrPath
from .wire import walk

if TYPE_CHECKING:
    import onnx

DTYPES: dict[int, np.dtype] = {
    code: np.dtype(kind)
    for code, kind in {
        1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64,
        9: np.bool_, 10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64, 16: ml_dtypes.bfloat16,
    }.items()
}  # fmt: skip
"""TensorProto.DataType -> numpy dtype, for types of whole bytes."""
FLOATS = frozenset(DTYPES[code] for code in (1, 10, 11, 16))
_EXTERNAL = 1


class StoredTensor(NamedTuple):
    """The place of an initializer's numbers: ``nbytes`` little-endian bytes at ``offset`` of ``file``."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class GraphFile:
    """A model at ``path``: ``model`` is its proto without large numbers, ``stored`` maps initializers to the
    places of their numbers.

    Raises:
        FormatError: the file is not a model, or an initializer is not where the file says.
        StorageError: a file is missing or cannot be read.
    """

    def __init__(self, path: StrPath) -> None:
        import onnx  # noqa: PLC0415 - only what opens a graph pays for it

        self.path = Path(path)
        self._confined: dict[str, Path] = {}
        skeleton, embedded = walk(self.path)
        with library_errors("protobuf", "the file is not an ONNX model", where=self.path):
            self.model: Any = onnx.ModelProto.FromString(skeleton)
        self.stored: dict[str, StoredTensor] = {}
        for tensor in self.model.graph.initializer:
            place = self._place(tensor, embedded)
            if place is not None:
                self.stored[tensor.name] = place

    @property
    def folder(self) -> Path:
        """The folder of the model and all its external data."""
        return self.path.parent

    @property
    def files(self) -> list[Path]:
        """The model's file and the files of its external data, each once."""
        return [self.path, *sorted({place.file for place in self.stored.values()} - {self.path})]

    @cached_property
    def readers(self) -> Mapping[str, list[onnx.NodeProto]]:
        """Value name -> the nodes that read it, including nodes in subgraphs."""
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in nodes_of(self.model.graph):
            for name in filter(None, node.input):
                readers.setdefault(name, []).append(node)
        return readers

    def array(self, name: str) -> np.ndarray:
        """Returns an initializer as a read-only array on the mapped file."""
        return map_tensor(self.stored[name])

    def _place(self, tensor: onnx.TensorProto, embedded: Mapping[str, Any]) -> StoredTensor | None:
        """Returns the place of one initializer, or None if its numbers are not stored as plain bytes."""
        dtype = DTYPES.get(tensor.data_type)
        where = f"{self.path}, initializer {tensor.name[:200]}"
        if dtype is None:
            return None
        nbytes = dtype.itemsize * count_of(tensor.dims, where)
        if tensor.data_location == _EXTERNAL:
            entries = external_entries(tensor, where)
            file = self.external_file(entries, where)
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", nbytes))
            with storage_errors(file):
                size = file.stat().st_size
            if length != nbytes or offset + nbytes > size:
                raise FormatError(
                    "an initializer does not fit its external data",
                    where=where,
                    expected=f"{nbytes} bytes",
                    found=f"length {length} at byte {offset} of {size}",
                    remedy="fetch the model and its data files again",
                )
            return StoredTensor(tensor.name, dtype, tuple(tensor.dims), file, offset, nbytes)
        place = embedded.get(tensor.name)
        if place is None:
            return None  # its numbers are in a typed field, or it has none
        if place.nbytes != nbytes:
            raise FormatError(
                "an initializer does not fit its shape",
                where=where,
                expected=f"{nbytes} bytes",
                found=place.nbytes,
            )
        return StoredTensor(tensor.name, dtype, tuple(tensor.dims), self.path, place.offset, nbytes)

    def external_file(self, entries: Mapping[str, str], where: str) -> Path:
        """The file that a tensor's :func:`external_entries` name, each looked at once: see
        :func:`require_inside`.
        """
        location = entries.get("location", "")
        if location not in self._confined:
            self._confined[location] = require_inside(self.path, location, where)
        return self._confined[location]


def nodes_of(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Yields the nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for inner in subgraphs_of(node):
            yield from nodes_of(inner)


def subgraphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yields the graphs among the attributes of a node."""
    for attribute in node.attribute:
        yield from (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """Returns an integer attribute of a node, or ``default``."""
    return next((int(entry.i) for entry in node.attribute if entry.name == name), default)


def map_tensor(place: StoredTensor) -> np.ndarray:
    """Returns the numbers at a place as a read-only array on the mapped file."""
    if math.prod(place.shape) == 0:
        return np.empty(place.shape, place.dtype)
    with storage_errors(place.file):
        raw = np.memmap(place.file, np.uint8, "r", place.offset, (place.nbytes,))
    return raw.view(np.ndarray).view(place.dtype).reshape(place.shape)


def require_place(graph: GraphFile, name: str) -> StoredTensor:
    """Returns the place of an initializer.

    Raises:
        Unsupported: its numbers are not stored as plain bytes.
    """
    if name not in graph.stored:
        raise Unsupported(
            "this initializer's numbers are not stored as plain bytes",
            where=f"{graph.path}, {name}",
            remedy="save the model again with raw or external data",
        )
    return graph.stored[name]


def external_entries(tensor: onnx.TensorProto, where: str) -> dict[str, str]:
    """Returns the entries ``location``, ``offset`` and ``length`` of a tensor's external data.

    Raises:
        FormatError: an entry occurs twice, since readers differ in which one they take; or an offset or
            length is not a number.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) < len(tensor.external_data):
        raise FormatError(
            "an initializer names two places for its external data",
            where=where,
            found=", ".join(entry.key for entry in tensor.external_data)[:200],
            remedy="save the model again",
        )
    for key in ("offset", "length"):
        text = entries.get(key)
        if text is not None and not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise FormatError(
                "the offset or length of external data is not a number",
                where=where,
                found=f"{key} {text[:40]!r}",
            )
    return entries


def require_inside(model: Path, location: str, where: str) -> Path:
    """Returns the file of external data of ``model``, which must be a regular file inside the model's folder.

    Raises:
        FormatError: the location leads elsewhere, even through a link, or to no file.
    """
    plain = PurePosixPath(location)
    windows = PureWindowsPath(location)
    folder = model.parent
    bad = (
        not location
        or "\0" in location
        or plain.is_absolute()
        or ".." in plain.parts
        or windows.drive
        or "\\" in location
    )
    path = folder / location if not bad else model
    if bad or not path.resolve().is_relative_to(folder.resolve()) or path.resolve() == model.resolve():
        raise FormatError(
            "external data must lie in the model's own folder",
            where=where,
            found=repr(location[:200]),
            expected="a plain relative path",
            remedy="do not use this file: it would read other files of this machine",
        )
    if not path.is_file():
        raise FormatError(
            "external data is missing",
            where=where,
            found=location[:200],
            remedy="copy the data file into the model's folder",
        )
    return path
