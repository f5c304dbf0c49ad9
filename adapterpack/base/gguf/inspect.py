"""Summarises a model in a GGUF file for ``adapterpack inspect``."""

from __future__ import annotations

import math
import mmap
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ...io import open_regular
from . import MAGIC
from .header import GGUFHeader, read_header


def header_at(path: Path) -> GGUFHeader | None:
    """Returns the header of a GGUF file without reading any tensor; None for a file of another format.

    Raises:
        FormatError, Unsupported: the header is malformed, or not supported.
    """
    with open_regular(path) as file:
        if file.read(len(MAGIC)) != MAGIC:
            return None
        with mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size, access=mmap.ACCESS_READ) as data:
            return read_header(data, path)


def inspect_model(path: Path) -> dict[str, Any] | None:
    """Returns a summary of a model in a GGUF file as JSON values; None if the file contains no model."""
    header = header_at(path)
    if header is None or header.values.get("general.type", "model") != "model":
        return None
    tensors = header.tensors.values()
    return {
        "kind": "base",
        "format": "gguf",
        "path": str(path),
        "name": header.values.get("general.name"),
        "model_type": header.values.get("general.architecture"),
        "tensors": len(tensors),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": dict(Counter(tensor.type.name for tensor in tensors)),
        "merged": header.values.get("adapterpack.merge"),
    }
