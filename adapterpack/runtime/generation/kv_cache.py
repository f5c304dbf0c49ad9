"""A key-value cache in fixed memory: the graph of one step writes into the buffers that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from ...bundle.manifest import PAST, PRESENT

ROOM = 256
"""The most free positions of a new buffer; when they are full, a larger one is made."""


class StaticCache:
    """The keys and values of a batch, each row from the beginning of its buffer, without padding.

    ``outputs`` has the cache of a pass, ``[batch, heads, total, head_dim]`` by the names of the graph, ``mask`` ``[batch, total]`` says
    which of its positions are real, in order.
    """

    def __init__(self, outputs: Mapping[str, Any], mask: np.ndarray, device: str) -> None:
        self.device = device
        self.lengths = mask.sum(axis=1)
        order = np.argsort(mask == 0, axis=1, kind="stable")[:, None, :, None]
        self.caches = {PAST + name.removeprefix(PRESENT): self._wider(np.take_along_axis(value.numpy(), order, axis=2))
                       for name, value in outputs.items() if name.startswith(PRESENT)}

    def step(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Makes room for one more token of every row: the mask with it, ``[batch, longest]`` int64, and the buffers by input."""
        self.lengths = self.lengths + 1
        longest = int(self.lengths.max())
        if any(value.shape()[2] < longest for value in self.caches.values()):
            self.caches = {name: self._wider(value.numpy()) for name, value in self.caches.items()}
        return (np.arange(longest)[None] < self.lengths[:, None]).astype(np.int64), self.caches

    def _wider(self, array: np.ndarray) -> Any:
        """A buffer with the rows of an array and as much room again, within limits."""
        longest = int(self.lengths.max())
        room = list(array.shape)
        room[2] = longest + min(max(longest, 16), ROOM)
        whole = np.zeros(room, array.dtype)
        whole[:, :, : min(longest, array.shape[2])] = array[:, :, :longest]
        value = ort.OrtValue.ortvalue_from_shape_and_type(whole.shape, whole.dtype, self.device, 0)  # memory of its own
        value.update_inplace(whole)
        return value
