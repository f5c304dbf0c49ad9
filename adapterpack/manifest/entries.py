"""What a manifest says of tensors and files: their sizes and their digests."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..errors import NonFinite
from ..io import safetensors
from ..io.safe_open import TENSORS, write_parts
from . import manifest as m

_BLOCK = 1 << 20
"""Bytes that go into a hash at once: it leaves the interpreter to other threads for as long as it takes."""


def entry_of(
    value: np.ndarray, group: str, param: str, scales: str | None = None, *, digest: str | None = None
) -> m.TensorEntry:
    """The manifest's entry for one tensor; ``digest`` is its sha256, where that is known."""
    name = safetensors.dtype_name(value.dtype)
    return m.TensorEntry(TENSORS, name, tuple(value.shape), digest or tensor_digest(value), group, param, scales)


def tensor_digest(value: np.ndarray) -> str:
    """The sha256 of a tensor's bytes, as hex."""
    return hashlib.sha256(safetensors.raw(value)).hexdigest()


def file_entry(name: str, parts: Iterable[bytes | memoryview], role: str) -> m.FileEntry:
    """The manifest's entry for a file of these parts."""
    hasher, size = hashlib.sha256(), 0
    for part in _joined(parts):
        hasher.update(part)
        size += len(part)
    return m.FileEntry(name, size, hasher.hexdigest(), role)


class Digests:
    """Digests of arrays whose numbers are finite, told again by where their bytes lie; the arrays are held.

    Whoever makes an array on a thread of its own can hash it there, from its core's cache.

    Example:
        >>> known, value = Digests(), np.ones((2, 3), np.float32)
        >>> known.add(value)
        >>> known.of(value.reshape(3, 2)) == tensor_digest(value), known.of(value.copy()) is None
        (True, True)
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int | None, int], tuple[np.ndarray, str]] = {}

    def add(self, value: np.ndarray) -> None:
        """Hashes an array; one that does not lie in C order is left alone, since what is written of it is a copy."""
        place = safetensors.place_of(value)
        if place is not None:
            self._known[place, value.nbytes] = value, tensor_digest(value)

    def of(self, value: np.ndarray) -> str | None:
        """The digest, if it is known."""
        known = self._known.get((safetensors.place_of(value), value.nbytes))
        return None if known is None else known[1]


def digested(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], source: safetensors.SafetensorsFile | None = None,
    known: Digests | None = None,
) -> tuple[dict[str, str], Future[m.FileEntry]]:
    """The digest of every tensor, and the entry of the file that holds them all, to be waited for: the same bytes twice, so on two threads.

    Where they are all the tensors of a file that was hashed before (``source``), the threads share the tensors instead. What is ``known``
    is not hashed again.

    Raises:
        NonFinite: a tensor holds NaN or infinity.
    """
    pool = ThreadPoolExecutor(1)
    try:
        if isinstance(source, safetensors.HeldFile) and source.ahead is not None and source.is_all_of(tensors, metadata):
            left, entry = iter(tensors.items()), Future[m.FileEntry]()  # one iterator for both: each takes what comes next
            entry.set_result(m.FileEntry(TENSORS, source.size, source.ahead.sha256, "tensors"))
            others = pool.submit(_digests, left)
            if not source.is_finite():
                list(_looked_through(tensors.items()))  # says which
            return _digests(left) | others.result(), entry
        file = pool.submit(lambda: file_entry(TENSORS, safetensors.pieces(tensors, metadata), "tensors"))
        found = {name: digest for name, value in tensors.items() if known is not None and (digest := known.of(value)) is not None}
        return found | _digests(_looked_through((name, value) for name, value in tensors.items() if name not in found)), file
    finally:
        pool.shutdown(wait=False)  # nothing more is begun


def _digests(tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, str]:
    return {name: tensor_digest(value) for name, value in tensors}


def _looked_through(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The same tensors, each shown to be finite when it is asked for, so that it is in a core's cache for what comes next."""
    for name, value in tensors:
        if not safetensors.all_finite(value):
            raise NonFinite("a tensor to be packed holds NaN or infinity", where=name,
                            remedy="lower the learning rate, or train in float32")
        yield name, value


def write_files(folder: Path, files: Mapping[str, Iterable[bytes | memoryview]]) -> None:
    """Writes files of these parts into an existing folder."""
    for name, parts in files.items():
        write_parts(folder / name, parts)


def _joined(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes in fewer parts: the small ones are put together in one buffer, which is used again and again."""
    left = iter(parts)
    first, second = next(left, b""), next(left, None)
    if second is None:
        yield first
        return
    buffer, end = bytearray(_BLOCK), 0
    for part in itertools.chain((first, second), left):
        if end + len(part) > _BLOCK:
            yield memoryview(buffer)[:end]
            end = 0
        if len(part) > _BLOCK // 4:
            if end:
                yield memoryview(buffer)[:end]
                end = 0
            yield part
        else:
            buffer[end : end + len(part)] = part
            end += len(part)
    yield memoryview(buffer)[:end]
