"""Builds a manifest's entries for tensors and files: sizes and digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ..adapter_methods import Tensors
from ..errors import NonFinite
from ..io import TENSORS, hashing, safetensors, write_parts
from . import manifest as m


def entry_of(
    value: np.ndarray, group: str, param: str, scales: str | None = None, *, digest: str | None = None
) -> m.TensorEntry:
    """Returns the manifest's entry for a tensor; ``digest`` is its sha256, if already known."""
    name = safetensors.dtype_name(value.dtype)
    return m.TensorEntry(
        TENSORS, name, tuple(value.shape), digest or tensor_digest(value), group, param, scales
    )


def tensor_digest(value: np.ndarray) -> str:
    """Returns the sha256 of a tensor's bytes, as hex."""
    return hashlib.sha256(safetensors.raw(value)).hexdigest()


def file_entry(name: str, parts: Iterable[bytes | memoryview], role: str) -> m.PackFile:
    """Returns the manifest's entry for a file with these parts."""
    hasher = hashlib.sha256()
    size = 0
    for part in parts:
        hasher.update(part)
        size += len(part)
    return m.PackFile(name, size, hasher.hexdigest(), role)


def digest_tensors(tensors: Tensors, metadata: Mapping[str, str]) -> tuple[dict[str, str], m.PackFile]:
    """Returns the sha256 (hex) of every tensor, and the entry of the file that holds them all.

    The tensors' bytes are hashed twice, once each for the tensor and the file, but in parallel: while one
    thread hashes a file of gigabytes, the others hash its tensors.

    Raises:
        NonFinite: a tensor holds NaN or infinity.
    """
    for name, value in tensors.items():
        if not safetensors.all_finite(value):
            raise NonFinite(
                "a tensor to be packed holds NaN or infinity",
                where=name,
                remedy="lower the learning rate, or train in float32",
            )
    whole = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    parts = list(safetensors.pieces(whole, metadata))
    sources: dict[str | None, hashing.Parts] = {
        None: parts,
        **{name: [safetensors.raw(value)] for name, value in whole.items()},
    }
    hashes = {name: digest.hex() for name, digest in hashing.digests(sources).items()}
    entry = m.PackFile(TENSORS, sum(map(len, parts)), hashes[None], "tensors")
    return {name: hashes[name] for name in tensors}, entry


def write_files(folder: Path, files: Mapping[str, Iterable[bytes | memoryview]]) -> None:
    """Writes files with these parts into an existing folder."""
    for name, parts in files.items():
        write_parts(folder / name, parts)
