"""Writes and reads ``.onnx_adapter`` files, ONNX Runtime's format for the values of a graph's optional
inputs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from ...adapter_methods import Tensors
from ...errors import FormatError, StorageError
from ...library_errors import library_errors
from ...tasks import Arrays
from ..ort import array_of, value_of


def write_adapter_file(path: Path, values: Tensors) -> None:
    """Writes arrays, keyed by the names of the graph inputs that they feed.

    Raises:
        StorageError: the disk is full, or the file system refuses.
    """
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: value_of(value) for name, value in values.items()})
    try:
        adapter.export_adapter(str(path))
    except RuntimeError as error:  # ONNX Runtime reports a failed write without its cause
        raise StorageError(
            "ONNX Runtime cannot write the adapter's file",
            where=path,
            remedy="see that the disk has space and that this user may write there; nothing was left behind",
        ) from error


def read_adapter_file(path: Path) -> Arrays:
    """Reads a file and returns copies of its arrays, by the names of the graph inputs that they feed.

    Raises:
        FormatError: there is no such file, or it is not of that format.
    """
    if not path.is_file():
        raise FormatError("an adapter file of the bundle is missing", where=path, remedy="export again")
    with library_errors(
        "onnxruntime", "an adapter file of the bundle cannot be read", where=path, remedy="export again"
    ):
        parameters = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        return {name: np.array(array_of(value)) for name, value in parameters.items()}
