"""Writes ``.onnx_adapter`` files, ONNX Runtime's own format of values for a graph's optional inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ...errors import StorageError


def write_adapter_file(path: Path, values: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays under the names of the inputs that they are for.

    Raises:
        StorageError: the disk is full, or the file system refuses.
    """
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    try:
        adapter.export_adapter(str(path))
    except RuntimeError as error:  # says in C++ that a byte was not taken, and not why
        raise StorageError("ONNX Runtime cannot write the adapter's file", where=path,
                           remedy="see that the disk has space and that this user may write there; nothing was left behind") from error
