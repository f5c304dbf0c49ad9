"""Lays out the files of a pack other than its manifest, in pieces: the tensors are many times the rest, and
are not copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from ..io import safetensors
from ..io.safe_open import TENSORS
from ..manifest import manifest as m
from ..peft import layout

METADATA = {"format": "pt"}
"""What PEFT and transformers look for in the tensor file."""


def contents(
    manifest: m.Manifest, tensors: Mapping[str, np.ndarray], extra: Mapping[str, bytes]
) -> dict[str, Iterable[bytes | memoryview]]:
    """The pieces of every file: the tensors, PEFT's config for a method that PEFT knows, and ``extra``."""
    config = layout.config_bytes(manifest)
    files: dict[str, Iterable[bytes | memoryview]] = {
        TENSORS: _pieces(tensors),
        **{name: [data] for name, data in extra.items()},
    }
    return files if config is None else {**files, layout.CONFIG: [config]}


def encode_files(
    manifest: m.Manifest, tensors: Mapping[str, np.ndarray], extra: Mapping[str, bytes] | None = None
) -> dict[str, bytes]:
    """The bytes of every file of :func:`contents`."""
    return {name: b"".join(parts) for name, parts in contents(manifest, tensors, extra or {}).items()}


def _pieces(tensors: Mapping[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    yield from safetensors.pieces(tensors, METADATA)  # whose header is made when it is read
