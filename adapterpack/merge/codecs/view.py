"""A quantized checkpoint seen as the weights that it stands for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from ...pack.checkpoint import Checkpoint
from ...pack.safetensors import TensorInfo
from .base import Parts, Weight
from .grid import Rows
from .registry import weights


class Decoded(Checkpoint):
    """A checkpoint whose ``tensors`` are those of the model; ``coded`` holds what it stores quantized, by name. A plain one is as it was.

    Raises:
        Unsupported: it is quantized in a way that is not read.
        FormatError: its tensors are not what its format says.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder)
        self.coded = weights(self)

    @cached_property
    def parts_of(self) -> Mapping[str, tuple[str, str]]:
        """Stored tensor -> the weight that it is part of, and its role there."""
        return {stored: (name, role) for name, weight in self.coded.items() for role, stored in weight.parts.items()}

    @cached_property
    def _model(self) -> dict[str, TensorInfo]:
        found = {}
        for name, info in self.stored.items():
            owner, _ = self.parts_of.get(name, (None, ""))
            if owner is None:
                found[name] = info
            else:  # where its first part is; the bytes are the parts'
                weight = self.coded[owner]
                found.setdefault(owner, TensorInfo(owner, weight.dtype, weight.shape, info.offset, info.nbytes))
        return found

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model by name, quantized ones in the dtype of their scales."""
        return self._model

    def parts(self, name: str) -> Parts:
        """The parts of a quantized weight by role."""
        return {role: super(Decoded, self).read(stored) for role, stored in self.coded[name].parts.items()}

    def matrix(self, name: str) -> Matrix:
        """A quantized weight, decoded where it is looked at."""
        return Matrix(self.coded[name], self.parts(name))


class Matrix:
    """A weight ``[out, in]`` that is decoded when rows of it are asked for, to float32."""

    dtype: np.dtype[Any] = np.dtype(np.float32)
    ndim = 2

    def __init__(self, weight: Weight, parts: Parts) -> None:
        self.weight, self.parts, self.shape = weight, parts, weight.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Rows:
        start, stop, _ = rows.indices(self.shape[0])
        step = self.weight.step
        first, last = start // step * step, min(self.shape[0], -(-stop // step) * step)
        return self.weight.decode(self.parts, slice(first, last))[start - first : stop - first]

    def astype(self, dtype: Any, copy: bool = True) -> Rows:
        """All of it."""
        return self[0 : self.shape[0]].astype(dtype, copy=copy)
