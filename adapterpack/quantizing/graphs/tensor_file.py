"""A file of tensors, one after another, so that no more than one is in memory while a graph is rewritten."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir


class TensorFile:
    """A file that grows by a tensor at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self._end = path, 0

    def append(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        """Writes a tensor to the end of the file, and returns it as external data."""
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
