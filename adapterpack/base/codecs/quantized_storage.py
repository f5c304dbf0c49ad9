"""Reads and writes the weights of quantized checkpoints block by block, through the codec of their format."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np

from ...adapter_methods import LAYOUTS
from ...errors import NonFinite, Unsupported
from ...io import Scratch
from .. import Round
from .base import Parts, Weight
from .grid import F32
from .storage import EncodedRows, LazyMatrix, Reader, Writer

_BLOCK = 1 << 20


def decoded(weight: Weight, parts: Parts) -> LazyMatrix:
    """Returns a weight ``[out, in]`` that is decoded to float32 when rows are indexed."""

    def read(start: int, stop: int) -> np.ndarray:
        return weight.decode(parts, slice(start, stop))

    return LazyMatrix(weight.shape, F32, read, weight.step)


def _transposed(matrix: LazyMatrix) -> LazyMatrix:
    """Returns the transpose of a matrix, such as an embedding; reads blocks of the stored rows."""
    count, width = matrix.shape
    step = max(1, _BLOCK // max(1, width))

    def read(start: int, stop: int) -> np.ndarray:
        blocks = (matrix[at : at + step][:, start:stop] for at in range(0, count, step))
        return np.concatenate(list(blocks)).T

    return LazyMatrix((width, count), matrix.dtype, read)


def quantized_reader(weight: Weight, parts: Parts, where: str) -> Reader:
    """Returns the reader of a quantized weight, whose raw blocks are already decoded."""
    matrix = decoded(weight, parts)

    def matrices(kind: str) -> list[LazyMatrix]:
        layout = LAYOUTS[kind]
        if layout.stacked or 2 not in layout.axes:
            raise Unsupported(
                f"a quantized weight is a matrix, and this site is of kind '{kind}'",
                expected="linear",
                where=where,
                found=weight.codec,
                remedy=(
                    "merge into the original checkpoint and quantize the result, or keep the adapter unmerged"
                ),
            )
        return [_transposed(matrix) if layout.turned else matrix]

    return Reader(
        F32,
        weight.shape,
        matrices,
        lambda: nullcontext(lambda rows, columns, scratch: matrix[rows]),
        lambda raw, scratch: raw,
        weight.step,
    )


def quantized_writer(weight: Weight, parts: Parts) -> Writer:
    """Returns the writer of a quantized weight, which requantizes rows to the codes with the least error."""

    def encode(values: np.ndarray, rows: slice, rounding: Round, scratch: Scratch) -> EncodedRows:
        if not np.isfinite(values).all():
            raise NonFinite(
                f"the merged tensor holds NaN or infinity, which {weight.codec} cannot hold",
                where=weight.name,
                remedy=(
                    "merge with dtype float32; if that does not help, the base or the adapter holds it "
                    "already"
                ),
            )
        updates, after, noise = weight.encode(parts, rows, values)
        return EncodedRows(updates, after, False, noise)

    return Writer(
        weight.codec,
        weight.parts,
        encode,
        lambda raw, work, scratch: raw,
        lambda role: parts[role],
        read_only_reason=weight.read_only_reason,
    )
