"""Checks that all external data of an ONNX model, in any part of it, is inside the model's own folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .graph_file import confined
from .wire import walk

_EXTERNAL = 1


def require_confined(path: Path, must_exist: bool = True) -> None:
    """Checks where the external data of the model at ``path`` is, without reading any; without ``must_exist`` it may be missing.

    Raises:
        FormatError: one is absolute, leads out of the model's folder, or over a link; or the file is no model.
        StorageError: a file is missing.

    Example:
        >>> require_confined(Path("bundle/model.onnx"))  # doctest: +SKIP
    """
    import onnx  # noqa: PLC0415 - only what opens a graph pays for it

    model = onnx.ModelProto.FromString(walk(path).skeleton)
    for tensor in _tensors(model):
        if tensor.data_location == _EXTERNAL:
            location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            confined(path, location, f"{path}, tensor {tensor.name[:200]}", must_exist)


def _tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto inside of a message: initializers, attributes, subgraphs, functions, training information."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in value if field.is_repeated else (value,):
            if inner.DESCRIPTOR.name == "TensorProto":
                yield inner
            else:
                yield from _tensors(inner)
