"""A tensor that is computed when it is read, a slice at a time where the reader takes slices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from ..adapter_methods import row_blocks

_BLOCK = 1 << 22
"""Numbers to write at a time."""


class SlicedTensor(ir.LazyTensor):
    """A tensor whose numbers ``read(index)`` returns, for an ``index`` as numpy takes it.

    A file gets it block by block, so a weight that is stored in fewer bits is never widened as a whole.

    Example:
        >>> table = np.arange(6, dtype=np.float16).reshape(3, 2)
        >>> tensor = SlicedTensor(lambda index: table[index].astype(np.float32), ir.DataType.FLOAT, (3, 2))
        >>> tensor.read((slice(1, 2),))
        array([[2., 3.]], dtype=float32)
    """

    __slots__ = ("read",)

    def __init__(
        self,
        read: Callable[[tuple[Any, ...]], np.ndarray],
        dtype: ir.DataType,
        shape: tuple[int, ...],
        name: str | None = None,
    ) -> None:
        super().__init__(lambda: ir.tensor(read((...,)), dtype, name=name), dtype, ir.Shape(shape), name=name)
        self.read = read

    def tofile(self, file: BinaryIO) -> None:
        """Writes the numbers in order to a binary file."""
        rows, *rest = self.shape.numpy()
        for block in row_blocks(rows, math.prod(rest), _BLOCK):
            ir.tensor(np.ascontiguousarray(self.read((block,))), self.dtype).tofile(file)
