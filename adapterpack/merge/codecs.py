"""Between the bytes of a weight as a checkpoint stores them and the numbers of its rows: one codec a way of storing.

A fold reads rows with ``decode``, changes them, and writes them back with ``encode``; what it does in between knows no storage. A codec is
bound to one tensor; what it keeps beside it (the scales of a quantized weight) are tensors of their own, its *companions*, which are
written when all rows are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import Unsupported
from ..pack.checkpoint import Checkpoint
from ..pack.quantized import scheme
from ..pack.safetensors import DTYPES, FLOATS
from .rounding import Round
from .scratch import Scratch


class Codec(Protocol):
    """How one weight is stored.

    ``work`` is the dtype of its numbers while they are folded; blocks of rows begin at multiples of ``step``. ``companions`` names the
    tensors beside it that ``encode`` changes.
    """

    @property
    def work(self) -> np.dtype[Any]:
        """See above."""
        ...

    @property
    def step(self) -> int:
        """See above."""
        ...

    @property
    def companions(self) -> tuple[str, ...]:
        """See above."""
        ...

    def fresh(self) -> Codec:
        """The codec for one pass over the tensor: what it gathers for its companions is its own."""
        ...

    def decode(self, raw: np.ndarray, rows: slice, scratch: Scratch) -> np.ndarray:
        """The numbers of stored rows, in ``work``: ``raw`` itself, or a buffer that is valid until the next call; for reading only."""
        ...

    def encode(self, values: np.ndarray, rows: slice, rounding: Round, scratch: Scratch) -> np.ndarray:
        """Rows as they are stored, in a buffer that is valid until the next call."""
        ...

    def reread(self, stored: np.ndarray, rows: slice, scratch: Scratch) -> np.ndarray:
        """The numbers of rows that ``encode`` has just stored, as :meth:`decode` gives those of the base."""
        ...

    def finished(self) -> Mapping[str, np.ndarray]:
        """The companions by name, once every row was encoded."""
        ...


class Plain(NamedTuple):
    """Numbers of a floating dtype, stored as they are; ``out`` is the dtype in which they are written."""

    dtype: str
    out: str
    step: int = 1
    companions: tuple[str, ...] = ()

    @property
    def work(self) -> np.dtype[Any]:
        """float32, or float64 for float64."""
        return work_dtype(self.dtype)

    def fresh(self) -> Plain:
        """See :class:`Codec`."""
        return self

    def decode(self, raw: np.ndarray, rows: slice, scratch: Scratch) -> np.ndarray:
        """See :class:`Codec`."""
        return widened(raw, self.work, scratch, "old")

    def encode(self, values: np.ndarray, rows: slice, rounding: Round, scratch: Scratch) -> np.ndarray:
        """See :class:`Codec`."""
        return rounding(values, DTYPES[self.out], scratch)

    def reread(self, stored: np.ndarray, rows: slice, scratch: Scratch) -> np.ndarray:
        """See :class:`Codec`."""
        return widened(stored, self.work, scratch, "old")

    def finished(self) -> Mapping[str, np.ndarray]:
        """See :class:`Codec`."""
        return {}


class Kind(NamedTuple):
    """One way of storing weights. ``bind`` gives the codec of a tensor, to be written in a safetensors dtype (None: as it is), or None
    where the tensor is not stored that way; it raises :class:`~adapterpack.errors.Unsupported` where it cannot be written so."""

    name: str
    bind: Callable[[Checkpoint, str, str | None], Codec | None]


def _plain(base: Checkpoint, name: str, out: str | None) -> Codec | None:
    stored = base.tensors[name].dtype
    return Plain(stored, out or stored) if stored in FLOATS else None


CODECS: list[Kind] = [Kind("plain", _plain)]
"""Asked in order; what is more particular stands before ``plain``."""
SCHEMES: set[str] = set()
"""The quantization schemes, as configs name them, whose tensors some codec reads."""


def codec_of(base: Checkpoint, name: str, out: str | None, where: object) -> Codec:
    """The codec of the tensor ``name``.

    Raises:
        Unsupported: none reads it.
    """
    for kind in CODECS:
        if (found := kind.bind(base, name, out)) is not None:
            return found
    raise Unsupported("the weight of this site is not stored as floating point", where=where, found=base.tensors[name].dtype,
                      remedy="merge into the original checkpoint, and quantize the result")


def require_readable(base: Checkpoint) -> None:
    """Checks that the weights of a checkpoint can be read: stored as they are, or by a scheme that has a codec.

    Raises:
        Unsupported: it is quantized in another way.
    """
    found = scheme(base)
    if found is not None and found not in SCHEMES:
        raise Unsupported("the base is quantized: its stored numbers are not its weights", where=base.folder, found=found,
                          remedy="dequantize it first: merge into the original checkpoint and quantize the result, or keep the adapter "
                                 "beside the base")


def work_dtype(dtype: str) -> np.dtype[Any]:
    """The dtype in which the fold of a tensor of that safetensors dtype is computed: float32, or float64 for float64."""
    return np.dtype(np.float64 if dtype == "F64" else np.float32)


_TABLES: dict[np.dtype[Any], np.ndarray] = {}


def widened(value: np.ndarray, dtype: np.dtype[Any], scratch: Scratch, name: str) -> np.ndarray:
    """``value`` itself if it has that dtype, else a copy in the scratch buffer of that name; exact.

    float16 and float8 go through a table of all their values: element by element, numpy's own conversion costs many times more.
    """
    if value.dtype == dtype:
        return value
    out = scratch.get(name, value.shape, dtype)
    if dtype == np.float32 and value.dtype.itemsize <= 2 and value.dtype != DTYPES["BF16"]:
        codes = np.uint8 if value.dtype.itemsize == 1 else np.uint16
        if value.dtype not in _TABLES:
            _TABLES[value.dtype] = np.arange(1 << 8 * value.dtype.itemsize, dtype=codes).view(value.dtype).astype(np.float32)
        np.take(_TABLES[value.dtype], value.view(codes), out=out, mode="clip")
    else:
        np.copyto(out, value, casting="unsafe")
    return out
