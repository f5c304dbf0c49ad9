"""What a codec is: it finds the weights that a checkpoint stores in a format of its own, decodes rows of them and encodes them again.

A weight may lie in several stored tensors, its *parts*, under the roles that its codec gives them. Whoever merges sees the weight alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import NamedTuple

import numpy as np

from ...errors import FormatError, Unsupported
from ..checkpoint import Checkpoint
from .grid import Coded, Grid, Rows
from .storage import Piece

Parts = Mapping[str, np.ndarray]
"""Role -> the stored tensor, as a view of its file."""


@dataclass(frozen=True)
class Weight:
    """One weight ``[out, in]`` of a checkpoint and how it is stored.

    Attributes:
        codec: the format's name, for messages.
        name: the tensor that it would be in a checkpoint of floats.
        shape: ``(out, in)``.
        dtype: the safetensors name of the dtype of its scales, for which it stands.
        parts: role -> stored tensor, all that the weight consists of.
        step: rows are decoded and encoded in multiples of this, but for the last.
        grid: levels and groups of its codes.
        unpack: the codes of rows, as ``[n, in]``, or as rows of one group each that hold the same values one after the other.
        pack: what codes of rows become in the parts.
        settle: what scales and zero points of rows read back as once they are stored; None where they cannot be written anew.
        sealed: why it can be read and not written, or None.
    """

    codec: str
    name: str
    shape: tuple[int, int]
    dtype: str
    parts: Mapping[str, str]
    grid: Grid
    unpack: Callable[[Parts, slice], Coded]
    pack: Callable[[Parts, slice, Coded], list[Piece]]
    settle: Callable[[Parts, slice, Rows, Rows | None], tuple[Rows, Rows | None]] | None = None
    step: int = 1
    sealed: str | None = None

    def decode(self, parts: Parts, rows: slice) -> Rows:
        """The values of ``rows``, float32 ``[n, in]``."""
        count = (rows.stop - rows.start) * self.shape[1]
        return self.grid.decode(self.unpack(parts, rows)).reshape(-1)[:count].reshape(-1, self.shape[1])

    def encode(self, parts: Parts, rows: slice, values: Rows) -> tuple[list[Piece], Rows, float]:
        """The pieces that hold ``values`` best, what they read back as, and the expected squared error of this grid before."""
        stored = self.unpack(parts, rows)
        before = self.grid.decode(stored)
        wanted = before.copy()  # a last block may be longer than the rows
        wanted.reshape(-1)[: values.size] = values.reshape(-1)
        made = self.grid.encode(wanted, before, stored, None if self.settle is None else partial(self.settle, parts, rows))
        after = self.grid.decode(made).reshape(-1)[: values.size].reshape(values.shape)
        return self.pack(parts, rows, made), after, self.grid.noise(stored)


class Codec(NamedTuple):
    """A format: the name that ``quant_method`` has for it, and the files beside this one that know it, imported when a base is of it.

    The ``find`` of each finds its weights, and raises :class:`Unsupported` where it knows the format and cannot read this form of it.
    """

    name: str
    summary: str
    files: tuple[str, ...]

    def find(self, base: Checkpoint) -> list[Weight]:
        """The weights of this format in a checkpoint."""
        return [weight for file in self.files for weight in import_module(f"{__package__}.{file}").find(base)]


class Place(NamedTuple):
    """The tensors of one module that ends with ``ending``: its path, and what else is stored under it by name."""

    base: Checkpoint
    codec: str
    path: str

    def part(self, role: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...] | None = None, bare: bool = False) -> str:
        """The name of a part after its dtype and shape were compared; None stands for any extent.

        Raises:
            FormatError: it is missing, or is not what the format says.
        """
        name = f"{self.path}{role}" if bare else f"{self.path}.{role}"
        info = self.base.stored.get(name)
        if info is None:
            raise FormatError(f"a tensor of this {self.codec} weight is missing", where=self.base.folder, expected=name,
                              remedy="fetch the checkpoint again")
        fits = shape is None or (len(shape) == len(info.shape) and all(a in (None, b) for a, b in zip(shape, info.shape, strict=True)))
        if info.dtype not in dtypes or not fits:
            wanted = " or ".join(dtypes) + ("" if shape is None else f" {['any' if n is None else n for n in shape]}")
            raise FormatError(f"a tensor is not what the {self.codec} format says", where=f"{self.base.folder}, {name}", expected=wanted,
                              found=f"{info.dtype} {list(info.shape)}", remedy="check the quantization settings in config.json")
        return name

    def has(self, role: str) -> bool:
        """Whether the module has that part."""
        return f"{self.path}.{role}" in self.base.stored

    def shape(self, role: str) -> tuple[int, ...]:
        """The stored shape of a part."""
        return self.base.stored[f"{self.path}.{role}"].shape

    def dtype(self, role: str) -> str:
        """The stored dtype of a part."""
        return self.base.stored[f"{self.path}.{role}"].dtype


def places(base: Checkpoint, codec: str, ending: str) -> list[Place]:
    """The modules that have a tensor of that ending, such as ``.qweight``."""
    return [Place(base, codec, name.removesuffix(ending)) for name in base.stored if name.endswith(ending)]


def unreadable(codec: str, base: Checkpoint, what: str, found: object, expected: object = None) -> Unsupported:
    """The error for a form of a format that is not read, with the way out."""
    return Unsupported(f"this form of {codec} is not read: {what}", where=base.folder, found=found, expected=expected,
                       remedy="merge into the original checkpoint and quantize the result, or keep the adapter beside the base")
