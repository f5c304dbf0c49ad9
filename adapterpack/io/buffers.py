"""Keeps a worker's buffers so that the blocks of a merge reuse memory."""

from __future__ import annotations

import math

import numpy as np


class Scratch:
    """The buffers of one worker, each as large as the largest block so far."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Returns an uninitialised array of that shape, valid until the next call with the same name."""
        nbytes = math.prod(shape) * dtype.itemsize
        if name not in self._buffers or self._buffers[name].nbytes < nbytes:
            self._buffers[name] = np.empty(nbytes, np.uint8)
        return self._buffers[name][:nbytes].view(dtype).reshape(shape)
