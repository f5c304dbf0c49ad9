"""The identity of a base model by its content, whatever its name, its sharding or its metadata say.

Two levels: ``structure`` hashes sorted (name, dtype, shape) and needs headers only; ``content`` also hashes every byte. The scheme is
versioned by its prefix, ``bfp1:``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

Header = tuple[str, str, tuple[int, ...]]


class Fingerprint(NamedTuple):
    """Both levels of one base."""

    structure: str
    content: str


def structure(tensors: Iterable[Header]) -> str:
    """The hash over sorted (name, dtype, shape).

    Example:
        >>> structure([("w", "F32", (2, 3))])[:12]
        'bfp1:bf9564b'
    """
    hasher = hashlib.sha256(b"bfp1:structure\0")
    for header in sorted(tensors):
        hasher.update(_framed(*header))
    return f"bfp1:{hasher.hexdigest()}"


def content(tensors: Iterable[tuple[str, str, tuple[int, ...], bytes | memoryview]]) -> str:
    """The hash over the sorted leaves ``H(name, dtype, shape, sha256(bytes))``; leaves are hashed by one thread per core."""
    items = sorted(tensors, key=lambda item: item[0])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        leaves = list(pool.map(_leaf, items))
    return f"bfp1:{hashlib.sha256(b'bfp1:content' + bytes(1) + b''.join(leaves)).hexdigest()}"


def _leaf(item: tuple[str, str, tuple[int, ...], bytes | memoryview]) -> bytes:
    name, dtype, shape, data = item
    return hashlib.sha256(b"bfp1:leaf\0" + _framed(name, dtype, shape) + hashlib.sha256(data).digest()).digest()


def _framed(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """The three fields, each behind its length, so that no two different headers share their bytes."""
    fields = (name, dtype, ",".join(map(str, shape)))
    return b"".join(len(raw).to_bytes(8, "little") + raw for raw in (text.encode("utf-8") for text in fields))
