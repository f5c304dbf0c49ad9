"""A file to which tensors are appended, so that only one tensor is in memory while a graph is rewritten."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir


class TensorFile:
    """A file that grows by one tensor at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self._end = path, 0

    def append(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Appends a tensor to the file, and returns it as external data."""
        with self.path.open("ab") as file:
            length = file.write(tensor.tobytes())
        stored = ir.ExternalTensor(
            self.path.name,
            self._end,
            length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=self.path.parent,
        )
        self._end += length
        return stored
