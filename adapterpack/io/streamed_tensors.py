"""Reads single tensors of a file too large for memory, and verifies the bytes of each read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, storage_errors
from .pinned_files import kept_open
from .safe_open import fill, open_inside
from .safetensors import DTYPES, SafetensorsFile, TensorInfo


class Streamed(Mapping[str, np.ndarray]):
    """Maps tensor names to arrays, which are read and compared with their sha256 at every access, so that
    nobody can exchange what was checked.

    The file is open only during a read, so that a process can use any number of packs, until
    :meth:`keep_open`. Tensors that are not stored in the file as such (``held``) stay in memory.
    """

    def __init__(
        self,
        path: Path,
        infos: Mapping[str, TensorInfo],
        digests: Mapping[str, str],
        held: Mapping[str, np.ndarray],
    ) -> None:
        self._path = path
        self._infos = infos
        self._digests = digests
        self._held = held
        self._descriptor: int | None = None

    @classmethod
    def of(
        cls, file: SafetensorsFile, tensors: Mapping[str, np.ndarray], digests: Mapping[str, str]
    ) -> Streamed:
        """Replaces ``tensors`` that are views of a mapped file by ones that are read on access; others stay
        in memory.
        """
        held = {name: value for name, value in tensors.items() if not file.is_view(name, value)}
        return cls(file.path, file.tensors, digests, held)

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._held:
            return self._held[name]
        data = self._bytes(name)
        info = self._infos.get(name)
        if info is None or hashlib.sha256(data.data).hexdigest() != self._digests[name]:
            raise self._changed(name)
        data.flags.writeable = False
        return data.view(DTYPES[info.dtype]).reshape(info.shape)

    def keep_open(self, checked: Mapping[str, np.ndarray]) -> bool:
        """From now on, reads from the file that currently has the name, even after it is removed or replaced,
        if it holds the tensors that were ``checked``.

        Returns False if the process may not keep another file open.

        Raises:
            FormatError: the file with that name now holds other tensors.
            StorageError: the file system refuses.
        """
        if self._descriptor is None:
            self._descriptor = kept_open(self._path, self)
            for name in self if self._descriptor is not None else ():
                if not np.array_equal(
                    self._bytes(name), np.ascontiguousarray(checked[name]).reshape(-1).view(np.uint8)
                ):
                    raise self._changed(name)
        return self._descriptor is not None

    def _bytes(self, name: str) -> np.ndarray:
        """Returns the current bytes of a tensor in the file; empty if the file is too short or lacks the
        tensor.
        """
        info = self._infos.get(name)
        data = np.empty(0 if info is None else info.nbytes, np.uint8)
        with storage_errors(self._path), self._opened() as descriptor:
            whole = info is not None and fill(descriptor, data.data, info.offset)
        return data if whole else data[:0]

    def _changed(self, name: str) -> FormatError:
        """Returns the error for a file that changed."""
        return FormatError(
            "the file changed while it was in use",
            where=f"{self._path}, tensor {name}",
            remedy="start again once nothing writes to it",
        )

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """Yields the descriptor to read from."""
        if self._descriptor is not None:
            yield self._descriptor
            return
        with open_inside(self._path) as file:
            yield file.fileno()

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)


class Unread(Mapping[str, np.ndarray]):
    """The parameters of one site of a streamed pack, read at every access."""

    def __init__(self, names: tuple[str, ...], read: Callable[[], Mapping[str, np.ndarray]]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def items(self) -> Any:
        """Returns all of them, reading once."""
        return self._read().items()
