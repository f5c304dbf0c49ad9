"""Row blocks of weights: where the old ones come from and where the new ones go, whatever a weight is stored as."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import NonFinite
from ..methods import row_blocks
from ..pack.safetensors import DTYPES, TensorInfo
from .bytes_io import opened, read_into, write_all
from .codecs.base import Piece
from .codecs.view import Matrix
from .fold import Rows, Scratch


class Written(NamedTuple):
    """What a block reads back as, and the expected squared error of the base's grid there."""

    values: Rows
    noise: float = 0.0


Sink = Callable[[slice, Rows], Written]
"""Takes the new values of rows, block after block."""
Source = Callable[[slice, "tuple[int, ...]"], Rows]
"""Gives the old values of rows, block after block, in the given shape."""


def steps(rows: int, columns: int, step: int) -> Iterator[slice]:
    """Blocks of about the usual size, whose starts are multiples of ``step``.

    Example:
        >>> list(steps(10, 1 << 17, 4))
        [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    for block in row_blocks(-(-rows // step), columns * step):
        yield slice(block.start * step, min(rows, block.stop * step))


def converted(value: np.ndarray, dtype: np.dtype[Any], scratch: Scratch, name: str) -> np.ndarray:
    """``value`` itself if it has that dtype, else a copy in the scratch buffer of that name, rounded to nearest even."""
    if value.dtype == dtype:
        return value
    other = scratch.get(name, value.shape, dtype)
    np.copyto(other, value, casting="unsafe")
    return other


@contextmanager
def plain_source(path: Path, info: TensorInfo, dtype: np.dtype[Any], scratch: Scratch) -> Iterator[Source]:
    """The numbers of a tensor from its file, widened to ``dtype``."""
    stored, done = DTYPES[info.dtype], 0
    with opened(path, os.O_RDONLY) as reader:

        def rows(_: slice, shape: tuple[int, ...]) -> Rows:
            nonlocal done
            raw = scratch.get("raw", shape, stored)
            read_into(reader, raw, info.offset + done * stored.itemsize)
            done += raw.size
            return converted(raw, dtype, scratch, "old")

        yield rows


@contextmanager
def coded_source(matrix: Matrix) -> Iterator[Source]:
    """The rows of a quantized weight, decoded."""
    yield lambda block, _: matrix[block]


@contextmanager
def plain_sink(path: Path, place: TensorInfo, scratch: Scratch) -> Iterator[Sink]:
    """Numbers rounded once to the dtype of their place in a file."""
    dtype, done = DTYPES[place.dtype], 0
    with opened(path, os.O_WRONLY) as sink:

        def put(_: slice, new: Rows) -> Written:
            nonlocal done
            stored = converted(new, dtype, scratch, "stored")
            write_all(sink, stored, place.offset + done * dtype.itemsize)
            done += stored.size
            return Written(stored)

        yield put


@contextmanager
def coded_sink(matrix: Matrix, places: Mapping[str, tuple[Path, TensorInfo]]) -> Iterator[Sink]:
    """Rows encoded in the format of ``matrix`` into its parts at ``places``, by role.

    Rows of a part are written as they come. A part that has the outputs in its columns is gathered in memory, packed as it is, and written
    at the end; what no row changes is copied.
    """
    gathered: dict[str, np.ndarray] = {}
    touched: set[str] = set()
    with ExitStack() as stack:
        sinks = {path: stack.enter_context(opened(path, os.O_WRONLY)) for path, _ in places.values()}

        def write(piece: Piece) -> None:
            path, place = places[piece.part]
            touched.add(piece.part)
            if piece.columns is not None:
                whole = gathered.setdefault(piece.part, np.empty(place.shape, DTYPES[place.dtype]))
                whole[piece.rows, piece.columns] = piece.values
                return
            values = np.ascontiguousarray(piece.values)
            size = values.nbytes // max(1, piece.rows.stop - piece.rows.start)
            write_all(sinks[path], values, place.offset + piece.rows.start * size)

        def put(block: slice, new: Rows) -> Written:
            if not np.isfinite(new).all():
                raise NonFinite(f"the merged tensor holds NaN or infinity, which {matrix.weight.codec} cannot hold",
                                where=matrix.weight.name,
                                remedy="merge with dtype float32; if that does not help, the base or the adapter holds it already")
            pieces, values, noise = matrix.weight.encode(matrix.parts, block, new)
            for piece in pieces:
                write(piece)
            return Written(values, noise)

        yield put
        for role, (path, place) in places.items():
            if role in gathered or role not in touched:
                write_all(sinks[path], np.ascontiguousarray(gathered.get(role, matrix.parts[role])), place.offset)
