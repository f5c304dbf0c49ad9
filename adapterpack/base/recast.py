"""Hashes the tensors of a base as they would be in another dtype, which proves that one checkpoint is a cast
of another (``base/variants.py``). Casts block by block and writes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np

from ..io import DTYPES, digests
from .checkpoint import Checkpoint

_LARGEST = {"F8_E4M3": 448.0}
"""The largest value of dtypes without infinity, to which PyTorch saturates."""


def cast_digests(base: Checkpoint, dtypes: Mapping[str, str], samples: bool = False) -> dict[str, bytes]:
    """Returns the sha256 of each tensor in ``dtypes``, cast to its dtype there: what ``Checkpoint.digests``
    of the cast base would be, or with ``samples`` its ``Checkpoint.samples``.
    """

    def hash_tensor(name: str, blocks: Iterator[memoryview]) -> bytes:
        """Casts and hashes one tensor block by block."""
        hasher = hashlib.sha256()
        old = base.tensors[name].dtype
        new = dtypes[name]
        # Overflow to infinity is what a cast does everywhere, so it is no reason to warn.
        with np.errstate(all="ignore"):
            for block in blocks:
                hasher.update(
                    block if old == new else cast(np.frombuffer(block, DTYPES[old]), new).view(np.uint8).data
                )
        return hasher.digest()

    return digests(
        {name: base.sampled(name, dtype) if samples else base.source(name) for name, dtype in dtypes.items()},
        hash_tensor,
    )


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Casts a float array to another floating dtype, rounding to nearest even as PyTorch does: float64 goes
    to small dtypes via float32.

    Example:
        >>> float(cast(np.array([1.005859375], np.float32), "BF16")[0])
        1.0078125
    """
    if dtype != "F64":
        values = values.astype(np.float32, copy=False)
    if dtype in _LARGEST:
        values = np.clip(values, -_LARGEST[dtype], _LARGEST[dtype])
    return values.astype(DTYPES[dtype], copy=False)
