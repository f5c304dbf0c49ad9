"""Products of two factors, added up in one order on every processor, and blocks of a weight that such a
product changes.

A compiled kernel does both where it was built (see :mod:`.build`) and the processor has fused multiply-add;
numpy does the product elsewhere. The kernel's sums are those of ``fma(up[k], down[k], sum)`` for ``k = 0, 1,
...``, as most libraries compute a product of so few terms; some kernels of OpenBLAS add in another order at
the edges of their panels, and so differ in the last bit of a few numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .loading import load

_kernel = load("_lowrank")
COMPILED = _kernel is not None
"""Whether the kernel is there."""
STORED = frozenset({"bfloat16", "float16", "float32"})
"""The names of the dtypes whose weights it folds."""
_PANEL = 32
"""Columns that the kernel goes through together; the rest of the last panel is zeros."""


def panels(up: Any, down: Any) -> np.ndarray | None:
    """``down`` ``[rank, columns]`` as the kernel reads it, ``[columns / 32 rounded up, rank, 32]``; None
    where numpy multiplies.
    """
    if _kernel is None or not (_is_float32(up) and _is_float32(down)):
        return None
    rank, columns = down.shape
    count = -(-columns // _PANEL)
    wide = np.zeros((rank, count * _PANEL), np.float32)
    wide[:, :columns] = down
    return np.ascontiguousarray(wide.reshape(rank, count, _PANEL).transpose(1, 0, 2))


def product(up: np.ndarray, down: np.ndarray, panels: np.ndarray | None, out: np.ndarray) -> None:
    """Writes ``up @ down`` into ``out`` ``[rows, columns]``.

    Example:
        >>> up, down, out = np.ones((2, 3), np.float32), np.full((3, 5), 2, np.float32), np.empty((2, 5),
        ...     np.float32)
        >>> product(up, down, panels(up, down), out)
        >>> out[0].tolist()
        [6.0, 6.0, 6.0, 6.0, 6.0]
    """
    if _kernel is None or panels is None:
        np.matmul(up, down, out=out)
        return
    there = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
    _kernel.product(np.ascontiguousarray(up), panels, there)
    if there is not out:
        np.copyto(out, there)


def fold(raw: np.ndarray, up: np.ndarray, panels: np.ndarray, out: np.ndarray) -> tuple[float, float, bool]:
    """Writes ``round(raw + up @ down)`` into ``out``, both ``[rows, columns]`` of one of the dtypes
    :data:`STORED`, C-contiguous and apart.

    Returns ``<E, E>`` and ``<E, D>`` for the change ``D`` and what storing made of it, ``D + E``, and whether
    any bit of ``out`` differs from ``raw``: sums of at most a row in float32, over rows in float64. Only
    where the kernel is :data:`COMPILED`.
    """
    assert _kernel is not None
    error, inner, moved = _kernel.fold(_bits(raw), np.ascontiguousarray(up), panels, _bits(out))
    return error, inner, moved


def _is_float32(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.float32


def _bits(value: np.ndarray) -> np.ndarray:
    return value.view(np.uint16) if value.dtype.name == "bfloat16" else value
