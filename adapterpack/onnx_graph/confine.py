"""That a model reads no file outside of its own folder: every tensor of it that lies elsewhere, in whatever part of the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .graph_file import confined
from .wire import walk

_EXTERNAL = 1


def require_confined(path: Path, there: bool = True) -> None:
    """Checks the places of all external data of the model at ``path``, without reading any of it; with ``there`` off it may be missing.

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
            confined(path, location, f"{path}, tensor {tensor.name[:200]}", there)


def _tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto inside of a message: initializers, attributes, subgraphs, functions, training information."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for each in value if field.is_repeated else (value,):
            if each.DESCRIPTOR.name == "TensorProto":
                yield each
            else:
                yield from _tensors(each)
