"""Computes the fingerprint of a base model from its content, whatever its name says: four levels, from nearly
free to certain.

| level | hashes | needs | says |
|---|---|---|---|
| ``structure`` | sorted (name, dtype, shape) | headers | the architecture and its sizes; not which weights |
| ``probe`` | the first, middle and last 4 KiB of tensors | small reads | most likely the same weights |
| ``files`` | sorted (path, size, sha256) of shards and index | a listing | the same files, not resharded |
| ``content`` | every byte of every tensor | a full read | the same weights, in whatever shards and order |

Nothing here opens a file: the functions take headers and digests, so that ``structure`` and ``files`` of a
remote base need no download of weights. The prefix ``bfp1:`` is the version of the scheme. Every hashed field
follows its length, and every hash input begins with the name of its level, so that different inputs never
have the same bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from ..errors import FormatError
from ..io import digests

SCHEME = "bfp1"
SAMPLE = 4096
"""Bytes in each of the three samples that ``probe`` takes of a tensor."""

Header = tuple[str, str, tuple[int, ...]]
"""Name, safetensors dtype, shape."""
DigestedHeader = tuple[str, str, tuple[int, ...], bytes]
"""The same with a sha256."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_Item = TypeVar("_Item", bound="tuple[Any, ...]")


class Fingerprint(NamedTuple):
    """The fingerprint of one base; unknown levels are None."""

    structure: str | None
    content: str | None
    files: str | None = None
    probe: str | None = None


class HashedFile(NamedTuple):
    """One weight file or index: its path below the base's folder with ``/``, its size in bytes, and its
    sha256 as hex.
    """

    path: str
    size: int
    sha256: str


def structure(tensors: Iterable[Header]) -> str:
    """Returns the hash over sorted (name, dtype, shape).

    Raises:
        FormatError: a name is repeated, or cannot be encoded in UTF-8.

    Example:
        >>> structure([("w", "F32", (2, 3))])[:12]
        'bfp1:bf9564b'
    """
    headers = {header[0]: _header(*header) for header in _distinct(tensors)}
    return _root("structure", headers)


def files(entries: Iterable[tuple[str, int, str]]) -> str:
    """Returns the hash over sorted (path, size in bytes, sha256 as hex) of the shards and the index, if there
    is one.

    Raises:
        FormatError: a path is repeated, a size is negative, or a digest is not 64 lowercase hex digits.

    Example:
        >>> files([("model.safetensors", 8, "0" * 64)])[:12]
        'bfp1:1f3ee87'
    """
    framed = {}
    for path, size, sha256 in _distinct(entries):
        if size < 0 or not _SHA256.fullmatch(sha256):
            raise FormatError(
                "this is not the size and sha256 of a file",
                where=path,
                expected="bytes and 64 lowercase hex digits",
                found=f"{size}, {sha256[:80]!r}",
            )
        framed[path] = _frame(path, str(size), sha256)
    return _root("files", framed)


def content(tensors: Iterable[DigestedHeader]) -> str:
    """Returns the hash over (name, dtype, shape, sha256 of the bytes) of every tensor.

    Raises:
        FormatError: a name is repeated.
    """
    return _root("content", _digested(b"bfp1:leaf\0", tensors))


def spans(nbytes: int) -> tuple[tuple[int, int], ...]:
    """Returns the bytes of a tensor of ``nbytes`` that the probe reads, as (offset, length): all of a small
    tensor, else three samples.

    The middle one begins at a multiple of 8, so that it does not cut an element.

    Example:
        >>> spans(100), spans(100_000)
        (((0, 100),), ((0, 4096), (47952, 4096), (95904, 4096)))
    """
    if nbytes <= 3 * SAMPLE:
        return ((0, nbytes),)
    last = nbytes - SAMPLE
    return (0, SAMPLE), (last // 2 // 8 * 8, SAMPLE), (last, SAMPLE)


def probe(samples: Iterable[DigestedHeader]) -> str:
    """Returns the hash over (name, dtype, shape, sha256 of the concatenated bytes at :func:`spans`) of every
    tensor.

    Raises:
        FormatError: a name is repeated.
    """
    return _root("probe", _digested(b"bfp1:sample\0", samples))


def _digested(kind: bytes, tensors: Iterable[DigestedHeader]) -> dict[str, bytes]:
    """Returns the digest of each tensor's header and bytes."""
    return {
        name: hashlib.sha256(kind + _header(name, dtype, shape) + sha256).digest()
        for name, dtype, shape, sha256 in _distinct(tensors)
    }


def in_memory(tensors: Iterable[tuple[str, str, tuple[int, ...], bytes | memoryview]]) -> Fingerprint:
    """Returns the fingerprint of tensors in memory, given as (name, dtype, shape, bytes): all levels but
    ``files``.

    Raises:
        FormatError: a name is repeated.

    Example:
        >>> fingerprint = in_memory([("w", "U8", (3,), b"abc")])
        >>> fingerprint.content[:12], fingerprint.files
        ('bfp1:d448978', None)
    """
    listed = _distinct(tensors)
    headers = [item[:3] for item in listed]
    views = {name: memoryview(data) for name, _, _, data in listed}
    sampled = {
        name: [data[start : start + length] for start, length in spans(data.nbytes)]
        for name, data in views.items()
    }
    whole = digests({name: [data] for name, data in views.items()})
    samples = digests(sampled)
    return Fingerprint(
        structure(headers),
        content((*header, whole[header[0]]) for header in headers),
        None,
        probe((*header, samples[header[0]]) for header in headers),
    )


def _root(level: str, parts: Mapping[str, bytes]) -> str:
    """Returns the hash of a level over its parts, in the order of their keys."""
    hasher = hashlib.sha256(f"{SCHEME}:{level}\0".encode())
    # Sorting by code point is the same as sorting by UTF-8 bytes.
    for key in sorted(parts):
        hasher.update(parts[key])
    return f"{SCHEME}:{hasher.hexdigest()}"


def _header(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Returns a tensor's header as bytes for hashing."""
    return _frame(name, dtype, ",".join(map(str, shape)))


def _frame(*fields: str) -> bytes:
    """Joins fields, each after its length."""
    try:
        encoded = [text.encode("utf-8") for text in fields]
    except UnicodeEncodeError as error:
        raise FormatError(
            "half of a surrogate pair, which is no character", where=repr(fields[0])[:200]
        ) from error
    return b"".join(len(raw).to_bytes(8, "little") + raw for raw in encoded)


def _distinct(items: Iterable[_Item]) -> list[_Item]:
    """Returns the items as a list; raises unless their names (the first fields) differ."""
    listed = list(items)
    names = [item[0] for item in listed]
    if len(set(names)) != len(names):
        raise FormatError(
            "a name stands twice in one base", found=repr(next(n for n in names if names.count(n) > 1))[:200]
        )
    return listed
