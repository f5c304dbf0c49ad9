"""A quantized checkpoint seen as the weights that it stands for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from ...errors import Unsupported
from ...io.safetensors import FLOATS, TensorInfo
from ...pack.pack import Pack
from ..checkpoint import Checkpoint
from ..match import Verdict
from .base import Parts
from .plain import PlainReader, PlainWriter
from .quantized_storage import CodedReader, CodedWriter, Matrix
from .registry import weights
from .stack import StackReader, StackWriter
from .storage import Storage


class Decoded(Checkpoint):
    """A checkpoint whose ``tensors`` are those of the model; ``coded`` holds what it stores quantized, by name. A plain one is as it was.

    Raises:
        Unsupported: it is quantized in a way that is not read.
        FormatError: its tensors are not what its format says.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder)
        self.coded = weights(self)

    @property
    def inputs(self) -> list[Path]:
        """What is read, which no output may lie in."""
        return [self.folder]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report should say of the base, in sentences."""
        return ()

    def require(self, pack: Pack, content: bool | None = True, allow_structural: bool = False) -> Verdict:
        """That it is the base of ``pack``: see :meth:`~adapterpack.pack.pack.Pack.require_base`.

        Raises:
            BaseMismatch, SiteNotFound: it is not.
        """
        return pack.require_base(self, content=content, allow_structural=allow_structural)

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
        return found | {stack.name: TensorInfo(stack.name, stack.dtype, stack.shape, 0, 0) for stack in self.stacks.values()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model by name, quantized ones in the dtype of their scales; also fused parameters beside their parts."""
        return self._model

    def weight_name(self, path: str, recorded: str | None = None) -> str | None:
        """See :class:`Checkpoint`; of a tied head the table."""
        return super().weight_name(path, recorded) or self.tied_to(path)

    def parts(self, name: str) -> Parts:
        """The parts of a quantized weight by role."""
        return {role: super(Decoded, self).read(stored) for role, stored in self.coded[name].parts.items()}

    def matrix(self, name: str) -> Matrix:
        """A quantized weight, decoded where it is looked at."""
        return Matrix(self.coded[name], self.parts(name))

    def storage(self, name: str, out: str | None, where: object = None) -> Storage:
        """How the weight ``name`` is stored here, and how in an output of the safetensors dtype ``out`` (None: as it is here).

        Raises:
            Unsupported: it is neither of a quantized format nor floating point.
        """
        return self._storage(name, out, self.matrix(name) if name in self.coded else None, where)

    def _storage(self, name: str, out: str | None, matrix: Matrix | None, where: object) -> Storage:
        info = self.tensors[name]
        stack = self.stacks.get(name)
        if matrix is not None:
            return Storage(CodedReader(matrix, f"{self.folder}, {name}"), CodedWriter(matrix) if out is None else PlainWriter(name, out))
        if info.dtype not in FLOATS:
            raise Unsupported("the weight of this site is not stored as floating point", where=where or f"{self.folder}, {name}",
                              found=info.dtype, remedy="merge into the original checkpoint, and quantize the result")
        if stack is not None:
            return Storage(StackReader(self, stack), StackWriter(self, stack, out or info.dtype))
        return Storage(PlainReader(self, name), PlainWriter(name, out or info.dtype))
