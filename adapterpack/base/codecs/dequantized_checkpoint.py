"""Opens a quantized checkpoint so that its tensors appear with the names and shapes of the unquantized
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from ...errors import Unsupported
from ...io import FLOATS, TensorInfo
from ...paths import StrPath
from .. import Checkpoint
from ..tensor_rows import TensorTable
from .base import Parts
from .plain import plain_storage, plain_writer, stack_storage
from .quantized_storage import decoded, quantized_reader, quantized_writer
from .registry import weights
from .storage import LazyMatrix, WeightStorage


class DequantizedCheckpoint(Checkpoint):
    """A checkpoint whose ``tensors`` are the model's; ``quantized`` maps names to the weights that it stores
    quantized.

    Raises:
        Unsupported: its quantization cannot be read.
        FormatError: its tensors contradict its format.
    """

    def __init__(self, folder: StrPath) -> None:
        super().__init__(folder)
        self.quantized = weights(self)

    @cached_property
    def part_owners(self) -> Mapping[str, tuple[str, str]]:
        """Maps each stored tensor to the weight that it is a part of, and its role there."""
        return {
            stored: (name, role)
            for name, weight in self.quantized.items()
            for role, stored in weight.parts.items()
        }

    @cached_property
    def _model(self) -> Mapping[str, TensorInfo]:
        """The model's tensors: plain ones, quantized weights in place of their parts, and fused
        parameters.
        """
        tensors = {}
        for name, info in self.stored.items():
            owner, _ = self.part_owners.get(name, (None, ""))
            if owner is None:
                tensors[name] = info
            else:
                # The weight takes the place of its first part.
                weight = self.quantized[owner]
                tensors.setdefault(
                    owner, TensorInfo(owner, weight.dtype, weight.shape, info.offset, info.nbytes)
                )
        stacks = {
            stack.name: TensorInfo(stack.name, stack.dtype, stack.shape, 0, 0)
            for stack in self.stacks.values()
        }
        return TensorTable(tensors | stacks)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model by name: quantized ones in the dtype of their scales, and fused
        parameters in addition to their parts.
        """
        return self._model

    def weight_name(self, path: str, recorded: str | None = None) -> str | None:
        """Returns the tensor with a module's weight, as :meth:`Checkpoint.weight_name` does; for a tied
        output head, the embedding.
        """
        return super().weight_name(path, recorded) or self.tied_to(path)

    def parts(self, name: str) -> Parts:
        """Returns the parts of a quantized weight by role."""
        return {
            role: super(DequantizedCheckpoint, self).read(stored)
            for role, stored in self.quantized[name].parts.items()
        }

    def row_order(self, name: str) -> np.ndarray | None:
        """Returns, for each row of a run in the file, its row in the model's run; None if a weight's rows are
        in the model's order.
        """
        return None

    def matrix(self, name: str) -> LazyMatrix:
        """Returns a quantized weight that is decoded when rows are indexed."""
        return decoded(self.quantized[name], self.parts(name))

    def storage(self, name: str, out: str | None, where: object = None) -> WeightStorage:
        """Returns how the weight ``name`` is stored here, and how in an output of the safetensors dtype
        ``out``; None keeps the stored form.

        Raises:
            Unsupported: the weight is neither in a quantized format nor floating point.
        """
        if name in self.quantized:
            weight = self.quantized[name]
            parts = self.parts(name)
            return WeightStorage(
                quantized_reader(weight, parts, f"{self.folder}, {name}"),
                quantized_writer(weight, parts) if out is None else plain_writer(name, out),
            )
        info = self.tensors[name]
        if info.dtype not in FLOATS:
            raise Unsupported(
                "the weight of this site is not stored as floating point",
                where=where or f"{self.folder}, {name}",
                found=info.dtype,
                remedy="merge into the original checkpoint, and quantize the result",
            )
        if name in self.stacks:
            return stack_storage(self, self.stacks[name], out or info.dtype)
        return plain_storage(self, name, out or info.dtype)
