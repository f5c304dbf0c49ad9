"""Computes the fingerprint that a base would have in another dtype, by casting and hashing block by block;
writes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np

from ..errors import ConfigError, NothingToDo, nearest
from ..io.hashing import HashedSource, digests
from ..io.safetensors import DTYPES, FLOATS
from . import fingerprint as fp
from .checkpoint import Checkpoint

_LARGEST = {"F8_E4M3": 448.0}
"""The largest value of dtypes without infinity, to which PyTorch saturates."""


def cast_fingerprint(base: Checkpoint, dtype: str) -> fp.Fingerprint:
    """Returns structure, content and probe of ``base`` with every floating tensor in ``dtype`` (a safetensors
    name), rounded as PyTorch does.

    Reads the whole base once, in constant memory.

    Raises:
        ConfigError: the dtype is not a floating dtype.
        NothingToDo: every floating tensor already has that dtype.
    """
    if dtype not in FLOATS:
        raise ConfigError(
            "not a floating dtype", where="dtype", found=repr(dtype), remedy=nearest(dtype, FLOATS)
        )
    dtypes = {name: dtype if info.dtype in FLOATS else info.dtype for name, info in base.tensors.items()}
    if all(dtypes[name] == info.dtype for name, info in base.tensors.items()):
        raise NothingToDo(
            "the cast would change nothing", where=base.folder, found=f"every floating tensor is {dtype}"
        )
    whole, samples = cast_digests(base, dtypes), cast_digests(base, dtypes, samples=True)
    headers = [(name, dtypes[name], info.shape) for name, info in base.tensors.items()]
    content = fp.root({header[0]: fp.leaf(*header, whole[header[0]]) for header in headers})
    return fp.Fingerprint(
        fp.structure(headers), content, None, fp.probe((*header, samples[header[0]]) for header in headers)
    )


def cast_digests(base: Checkpoint, dtypes: Mapping[str, str], samples: bool = False) -> dict[str, bytes]:
    """Returns the sha256 of the tensors in ``dtypes``, each cast to its dtype there; with ``samples``, only
    of what the probe would read.
    """

    def hash_tensor(name: str, blocks: Iterator[memoryview]) -> bytes:
        """Casts and hashes one tensor block by block."""
        hasher, old, new = hashlib.sha256(), base.tensors[name].dtype, dtypes[name]
        # Overflow to infinity is what a cast does everywhere, so it is no reason to warn.
        with np.errstate(all="ignore"):
            for block in blocks:
                hasher.update(
                    block if old == new else cast(np.frombuffer(block, DTYPES[old]), new).view(np.uint8).data
                )
        return hasher.digest()

    return digests(
        {
            name: _sample_ranges(base, name, dtype) if samples else base.source(name)
            for name, dtype in dtypes.items()
        },
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


def _sample_ranges(base: Checkpoint, name: str, dtype: str) -> HashedSource:
    """Returns the ranges of a tensor whose elements the probe would read if the tensor had the dtype
    ``dtype``.
    """
    info, source = base.tensors[name], base.source(name)
    old, new = DTYPES[info.dtype].itemsize, DTYPES[dtype].itemsize
    spans = fp.spans(info.nbytes // old * new)
    return source._replace(
        ranges=tuple((info.offset + start // new * old, length // new * old) for start, length in spans)
    )
