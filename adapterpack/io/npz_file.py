"""Reads the arrays of numpy's ``.npz`` files, without objects, within limits."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from ..errors import FormatError, printable
from .safe_open import open_regular
from .torch_file import records_in

_BFLOAT16 = np.dtype("V2")
"""What MLX writes for bfloat16, which numpy does not have."""


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a file by name: floats, integers and booleans.

    Raises:
        FormatError: the file is damaged, compressed, or holds anything else.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                records = records_in(archive)
                if sum(info.file_size for info in records.values()) > file.seek(0, io.SEEK_END):
                    raise ValueError("its records overlap")
                return {name.removesuffix(".npy"): _array(archive.read(name)) for name in records}
        except (zipfile.BadZipFile, EOFError, LookupError, RuntimeError, ValueError) as error:
            raise FormatError(
                f"this is no file of arrays that numpy or MLX wrote: {printable(str(error)[:200])}",
                where=path,
                remedy="fetch it again from where it came",
            ) from error


def _array(data: bytes) -> np.ndarray:
    """Returns the array of one record, whose header says no more than there is."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    shape, by_columns, dtype = read_header(file)
    if dtype != _BFLOAT16 and dtype.kind not in "fiub":
        raise ValueError(f"an array of {dtype}")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError("an array is not as large as its header says")
    numbers = np.frombuffer(data, ml_dtypes.bfloat16 if dtype == _BFLOAT16 else dtype, offset=file.tell())
    return numbers.reshape(shape, order="F" if by_columns else "C")
