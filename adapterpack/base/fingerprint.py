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
from ..io.hashing import digests

SCHEME = "bfp1"
SAMPLE = 4096
"""Bytes in each of the three samples that ``probe`` takes of a tensor."""

Header = tuple[str, str, tuple[int, ...]]
"""Name, safetensors dtype, shape."""
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


def leaf(name: str, dtype: str, shape: tuple[int, ...], sha256: bytes) -> str:
    """Returns one tensor's part of ``content``, as hex: ``H(name, dtype, shape, sha256 of its bytes)``."""
    return hashlib.sha256(b"bfp1:leaf\0" + _header(name, dtype, shape) + sha256).hexdigest()


def root(leaves: Mapping[str, str]) -> str:
    """Returns ``content`` from the leaves: the hash over all of them in the order of their names.

    Raises:
        FormatError: a leaf is not 64 lowercase hex digits.

    Example:
        >>> w = leaf("w", "U8", (3,), hashlib.sha256(b"abc").digest())
        >>> root({"w": w}) == content([("w", "U8", (3,), b"abc")])
        True
    """
    return _root("content", {name: _unhex(name, value) for name, value in leaves.items()})


def content(tensors: Iterable[tuple[str, str, tuple[int, ...], bytes | memoryview]]) -> str:
    """Returns ``content`` for tensors in memory, given as (name, dtype, shape, bytes).

    Raises:
        FormatError: a name is repeated.
    """
    items = _distinct(tensors)
    hashes = digests({name: [data] for name, _, _, data in items})
    return root({name: leaf(name, dtype, shape, hashes[name]) for name, dtype, shape, _ in items})


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


def probe(samples: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """Returns the hash over (name, dtype, shape, sha256 of the concatenated bytes at :func:`spans`) of every
    tensor.

    Raises:
        FormatError: a name is repeated.
    """
    return _root(
        "probe",
        {
            name: hashlib.sha256(b"bfp1:sample\0" + _header(name, dtype, shape) + sha256).digest()
            for name, dtype, shape, sha256 in _distinct(samples)
        },
    )


def in_memory(tensors: Iterable[tuple[str, str, tuple[int, ...], bytes | memoryview]]) -> Fingerprint:
    """Returns the fingerprint of tensors in memory, given as (name, dtype, shape, bytes): all levels but
    ``files``.

    Raises:
        FormatError: a name is repeated.

    Example:
        >>> fingerprint = in_memory([("w", "U8", (3,), b"abc")])
        >>> fingerprint.content == content([("w", "U8", (3,), b"abc")]), fingerprint.files
        (True, None)
    """
    views = [(name, dtype, shape, memoryview(data)) for name, dtype, shape, data in tensors]
    sampled = ((name, dtype, shape, _sample(data)) for name, dtype, shape, data in views)
    return Fingerprint(structure(item[:3] for item in views), content(views), None, probe(sampled))


def _sample(data: memoryview) -> bytes:
    """Returns the sha256 of the samples of a tensor."""
    hasher = hashlib.sha256()
    for start, length in spans(data.nbytes):
        hasher.update(data[start : start + length])
    return hasher.digest()


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


def _unhex(name: str, value: str) -> bytes:
    """Returns the bytes of a leaf."""
    if not _SHA256.fullmatch(value):
        raise FormatError(
            "this is not a leaf", where=name, expected="64 lowercase hex digits", found=repr(value)[:80]
        )
    return bytes.fromhex(value)
