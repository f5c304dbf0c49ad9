"""A file to which tensors are appended, so that only one tensor is in memory while a graph is rewritten."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from ...onnx_graph import PAGE

_INLINE = 256
"""Tensors of up to this many bytes stay in the message, where inference of shapes reads them."""


class TensorFile:
    """A file that grows by one tensor at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end = 0

    def append(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """Appends a tensor to the file, at a multiple of a page, and returns it as external data; returns a
        small one with its numbers in memory.
        """
        if tensor.nbytes <= _INLINE:
            outside = isinstance(tensor, ir.ExternalTensor)
            return ir.Tensor(tensor.numpy(), tensor.dtype, name=tensor.name) if outside else tensor
        start = -(-self._end // PAGE) * PAGE
        # not in the mode that appends, in which the kernel copies no ranges between files
        with self.path.open("r+b" if self._end else "wb") as file:
            file.seek(start)
            tensor.tofile(file)
            self._end = file.seek(0, os.SEEK_END)
        return ir.ExternalTensor(
            self.path.name,
            start,
            self._end - start,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=self.path.parent,
        )

    def take_rest(self, model: ir.Model) -> None:
        """Appends every initializer of a graph that is not in the file yet."""
        for value in (value for graph in model.graphs() for value in graph.initializers.values()):
            tensor = value.const_value
            here = isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) == self.path
            if tensor is not None and not here:
                value.const_value = self.append(tensor)
