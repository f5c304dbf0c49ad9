"""Defines the interface of a codec, which finds the weights of a quantized format in a checkpoint and decodes
and encodes their rows.

A weight may be stored in several tensors, its *parts*; the codec gives each a role. A merge only sees
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from ...errors import FormatError, Unsupported
from .. import Checkpoint
from .grid import Grid, QuantizedRows, Rows, ScaleRows
from .storage import PartUpdate

SCALES = ("F32", "BF16", "F16")
"""The dtypes in which formats store scales."""
WORDS = ("I32", "U32")
"""The dtypes of words of packed codes."""
Parts = Mapping[str, np.ndarray]
"""Maps roles to stored tensors, as views of the mapped file."""


@dataclass(frozen=True)
class Weight:
    """A quantized weight ``[out, in]`` of a checkpoint, and how to decode and encode it.

    Attributes:
        codec: name of the format, for messages.
        name: the name of the tensor that holds it in the unquantized checkpoint.
        shape: ``(out, in)``.
        dtype: safetensors dtype that the weight is treated as, that of its scales.
        parts: maps roles to names of stored tensors.
        step: blocks of rows to decode or encode must begin at multiples of this.
        grid: levels and groups of its codes.
        unpack: reads the codes of rows, as ``[n, in]`` or, in the same order, with a row for each group.
        pack: turns the codes of rows into updates of the parts.
        round_scales: rounds scales and zero points of rows to values that can be stored; None where they
            cannot be changed.
        read_only_reason: why it cannot be written, or None if it can.
    """

    codec: str
    name: str
    shape: tuple[int, int]
    dtype: str
    parts: Mapping[str, str]
    grid: Grid
    unpack: Callable[[Parts, slice], QuantizedRows]
    pack: Callable[[Parts, slice, QuantizedRows], list[PartUpdate]]
    round_scales: Callable[[Parts, slice, Rows, Rows | None], ScaleRows] | None = None
    step: int = 1
    read_only_reason: str | None = None

    def decode(self, parts: Parts, rows: slice) -> Rows:
        """Returns the values of ``rows``, float32 ``[n, in]``."""
        count = (rows.stop - rows.start) * self.shape[1]
        return self.grid.decode(self.unpack(parts, rows)).reshape(-1)[:count].reshape(-1, self.shape[1])

    def encode(self, parts: Parts, rows: slice, values: Rows) -> tuple[list[PartUpdate], Rows, float]:
        """Returns the updates that store ``values`` with the least error, the values as stored, and the
        expected squared error of the old grid.
        """
        stored = self.unpack(parts, rows)
        before = self.grid.decode(stored)
        # The stored groups may extend beyond these rows; keep what they decode to there.
        wanted = before.copy()
        wanted.reshape(-1)[: values.size] = values.reshape(-1)
        encoded = self.grid.encode(
            wanted,
            before,
            stored,
            None if self.round_scales is None else partial(self.round_scales, parts, rows),
        )
        after = self.grid.decode(encoded).reshape(-1)[: values.size].reshape(values.shape)
        return self.pack(parts, rows, encoded), after, self.grid.noise(stored)


class Codec(NamedTuple):
    """A format of quantized checkpoints; ``name`` is its ``quant_method`` in ``config.json``.

    ``match`` returns the weights of this format in a checkpoint, and raises :class:`Unsupported` for a
    variant of the format that cannot be read.
    """

    name: str
    summary: str
    match: Callable[[Checkpoint], list[Weight]]


class ModuleTensors(NamedTuple):
    """The stored tensors of one quantized module, by their role in the format."""

    base: Checkpoint
    codec: str
    path: str

    def part(self, role: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...] | None = None) -> str:
        """Returns the name of a part after checking its dtype and shape; None in ``shape`` allows any extent.

        Raises:
            FormatError: it is missing, or has another dtype or shape than the format requires.
        """
        name = f"{self.path}.{role}"
        info = self.base.stored.get(name)
        if info is None:
            raise FormatError(
                f"a tensor of this {self.codec} weight is missing",
                where=self.base.folder,
                expected=name,
                remedy="fetch the checkpoint again",
            )
        fits = shape is None or (
            len(shape) == len(info.shape)
            and all(a in (None, b) for a, b in zip(shape, info.shape, strict=True))
        )
        if info.dtype not in dtypes or not fits:
            wanted = " or ".join(dtypes) + (
                "" if shape is None else f" {['any' if n is None else n for n in shape]}"
            )
            raise FormatError(
                f"a tensor is not what the {self.codec} format says",
                where=f"{self.base.folder}, {name}",
                expected=wanted,
                found=f"{info.dtype} {list(info.shape)}",
                remedy="check the quantization settings in config.json",
            )
        return name

    def has(self, role: str) -> bool:
        """Whether the module has that part."""
        return f"{self.path}.{role}" in self.base.stored

    def shape(self, role: str) -> tuple[int, ...]:
        """Returns the stored shape of a part."""
        return self.base.stored[f"{self.path}.{role}"].shape

    def dtype(self, role: str) -> str:
        """Returns the stored dtype of a part."""
        return self.base.stored[f"{self.path}.{role}"].dtype


def modules_with(base: Checkpoint, codec: str, ending: str) -> list[ModuleTensors]:
    """Returns the modules with a tensor whose name ends with ``ending``, such as ``.qweight``."""
    return [
        ModuleTensors(base, codec, name.removesuffix(ending)) for name in base.stored if name.endswith(ending)
    ]


def unreadable(
    codec: str, base: Checkpoint, what: str, found: object, expected: object = None
) -> Unsupported:
    """Returns the error for a variant of a format that cannot be read."""
    return Unsupported(
        f"this form of {codec} is not read: {what}",
        where=base.folder,
        found=found,
        expected=expected,
        remedy="merge into the original checkpoint and quantize the result, or keep the adapter unmerged",
    )
