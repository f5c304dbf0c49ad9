"""Reads the headers of tensor files on a hub with one or two range requests each, whatever their size."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ...io import safetensors
from .client import Remote
from .transfer import read_range


class HeaderFile(safetensors.SafetensorsFile):
    """A tensor file of which only the header was read. Its tensors have names, dtypes and shapes, and read as
    zeros that take no memory.

    Raises:
        FormatError: the header breaks a rule of the format.
    """

    def __init__(self, head: bytes, size: int, where: str) -> None:
        self.path = Path(where)
        self.size = size
        self.head = head
        self._bytes = head
        self.tensors, self.metadata = safetensors.parse_header(io.BytesIO(head), size, where)

    def read(self, name: str) -> np.ndarray:
        """Returns zeros of the tensor's dtype and shape."""
        info = self.tensors[name]
        return np.broadcast_to(np.zeros((), safetensors.DTYPES[info.dtype]), info.shape)


def read_header(remote: Remote, path: str, size: int, first: int) -> HeaderFile:
    """Reads the header of a tensor file of ``size`` bytes, by a range of ``first`` bytes, and a second range
    if it is longer.

    Raises:
        FormatError: the file is no tensor file, or the hub sends fewer bytes.
        HubError: the hub does not send that range.
    """
    head = read_range(remote, path, 0, min(size, first))
    length = 8 + int.from_bytes(head[:8], "little")
    if len(head) < length <= min(size, 8 + safetensors.MAX_HEADER):
        head += read_range(remote, path, len(head), length - len(head))
    return HeaderFile(head, size, f"{remote}, {path}")
