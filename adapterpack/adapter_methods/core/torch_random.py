"""Reproduces the numbers of PyTorch's CPU generator without PyTorch, so that a pack stores a seed instead of
a frozen random tensor.

The generator is the Mersenne Twister (MT19937), seeded with the lower 32 bits of the seed; PyTorch's
``at::uniform_real_distribution`` and ``randperm_cpu`` define how its words become numbers. The result is the
same on every platform.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from ...errors import Unsupported

_MOST = 1 << 28
_BLOCK = 1 << 18
_NARROW = (1 << 32) // 20
"""For this length and above ``torch.randperm`` uses another algorithm, which this module does not
reproduce.
"""


class TorchGenerator:
    """Behaves like ``torch.Generator().manual_seed(seed)``: each method returns what torch's function of that
    name would and advances the generator as far.

    Example:
        >>> TorchGenerator(0).uniform((3,), 0.0, 1.0).astype(float).round(4).tolist()  # torch.rand(3)
        [0.4963, 0.7682, 0.0885]
        >>> TorchGenerator(0).permute(10, 4).tolist()  # torch.randperm(10)[:4]
        [4, 1, 7, 5]
    """

    def __init__(self, seed: int) -> None:
        self._words = np.random.MT19937()
        self._words._legacy_seeding(seed & 0xFFFFFFFF)

    def uniform(self, shape: tuple[int, ...], low: float, high: float, dtype: Any = np.float32) -> np.ndarray:
        """Returns ``torch.empty(shape, dtype).uniform_(low, high)`` for float32 or bfloat16, bit for bit, in
        ``[low, high)``.

        Raises:
            Unsupported: the shape has more than 2^28 elements; widths and ranks come from untrusted files.
        """
        if math.prod(shape) > _MOST:
            raise Unsupported(
                "the random matrix of this adapter would be too large",
                expected=f"at most {_MOST} elements",
                found=shape,
                remedy="use a smaller rank",
            )
        start, end = np.float32(low), np.float32(high)
        values = np.empty(math.prod(shape), dtype)
        for block in _blocks(values):
            part = (self._raw(block.size) & 0xFFFFFF) * 2.0**-24
            # torch uses one fused multiply-add here; float64 gives the same single rounding
            block[:] = (part * np.float64(end - start) + np.float64(start)).astype(np.float32)
            # Rounding may reach the excluded upper end; torch wraps such values to the lower one.
            block[block == end.astype(dtype)] = start.astype(dtype)
        return values.reshape(shape)

    def permute(self, n: int, first: int) -> np.ndarray:
        """Returns ``torch.randperm(n)[:first]``: int64 ``[min(first, n)]``, exact, without an array of length
        ``n``.

        Raises:
            Unsupported: ``n`` is 214748364 or more.
        """
        if n >= _NARROW:
            raise Unsupported(
                "positions in so large a weight cannot be drawn as PyTorch draws them",
                expected=f"fewer than {_NARROW}",
                found=n,
                remedy="leave this layer out of the targets",
            )
        first = min(first, n)
        # torch does not draw for the last place, which has nothing left to swap with
        draws = min(first, n - 1)
        moved: dict[int, int] = {}  # sparse Fisher-Yates: only the places that differ from the identity
        chosen = np.empty(first, np.int64)
        for i, step in enumerate((self._raw(draws) % (n - np.arange(draws, dtype=np.uint64))).tolist()):
            chosen[i] = moved.get(i + step, i + step)
            moved[i + step] = moved.pop(i, i)
        if first > draws:
            chosen[draws:] = moved.get(draws, draws)
        return chosen

    def normal(self, shape: tuple[int, ...], std: float) -> np.ndarray:
        """Returns ``torch.normal(0, std, shape)`` as float32, within 1e-6, because libraries round logarithm
        and sine differently.
        """
        count = math.prod(shape)
        # torch draws fewer than 16 numbers one pair at a time in float64, and more in vectors of 16.
        if count < 16:
            return (std * self._scalar_normals(count)).astype(np.float32).reshape(shape)
        values = self.uniform((count,), 0.0, 1.0)
        for block in _blocks(values[: count - count % 16]):
            block[:] = std * _box_muller(block.astype(np.float64))
        if count % 16:  # torch draws the last 16 again, overlapping the block before
            values[-16:] = std * _box_muller(self.uniform((16,), 0.0, 1.0).astype(np.float64))
        return values.reshape(shape)

    def _scalar_normals(self, count: int) -> np.ndarray:
        pairs = self._raw(4 * -(-count // 2)).reshape(-1, 2, 2) @ np.array([1 << 32, 1], np.uint64)
        first, second = ((pairs & ((1 << 53) - 1)) * 2.0**-53).T
        radius = np.sqrt(-2 * np.log1p(-second))
        angle = 2 * math.pi * first
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]

    def _raw(self, count: int) -> np.ndarray:
        return np.asarray(self._words.random_raw(count), np.uint64)


@lru_cache(maxsize=64)
def places(seed: int, rows: int, columns: int, count: int) -> np.ndarray:
    """Returns ``count`` different positions in ``[rows, columns]`` in the order of the draw, as int64 ``[2,
    count]`` (row and column indices).
    """
    return np.stack(np.divmod(TorchGenerator(seed).permute(rows * columns, count), columns))


def svd_lowrank(
    matrix: np.ndarray, rank: int, niter: int, seed: int, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns U ``[m, rank]``, S ``[rank]`` and V ``[n, rank]`` as ``torch.svd_lowrank`` estimates them on
    the CPU from the random numbers of a seed, computed in ``dtype``.

    ``niter`` is the number of power iterations (Halko et al. 2009, arXiv 0909.4061, algorithm 5.1). The signs
    are those of numpy's decomposition.

    Example:
        >>> svd_lowrank(np.diag([3.0, 2.0, 1.0]), 2, 20, seed=0, dtype=float)[1].round(6).tolist()
        [3.0, 2.0]
    """
    start = TorchGenerator(seed).normal((min(matrix.shape), rank), 1.0).astype(dtype)
    turned = matrix.shape[0] < matrix.shape[1]
    tall = (matrix.T if turned else matrix).astype(dtype)
    U, S, right = svd_in_range(tall, start, niter)
    return (right.T, S, U) if turned else (U, S, right.T)


def svd_in_range(
    matrix: np.ndarray, start: np.ndarray, iterations: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ``U``, ``S`` and ``V^T`` of a matrix ``[m, n]`` in the range that power iterations find from
    ``start`` ``[n, k]``.
    """
    Q = np.linalg.qr(matrix @ start)[0]
    for _ in range(iterations):
        Q = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ Q)[0])[0]
    inner, S, right = np.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Q @ inner, S, right


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yields a flat array in parts whose length is a multiple of 16, so that intermediate values take little
    memory.
    """
    return (values[start : start + _BLOCK] for start in range(0, values.size, _BLOCK))


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Turns uniform numbers into normal ones in groups of 16, in torch's order: the first eight give the
    radii, the others the angles.
    """
    first, second = np.moveaxis(uniform.reshape(-1, 2, 8), 1, 0)
    radius = np.sqrt(-2 * np.log(1 - first))
    angle = 2 * math.pi * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
