"""Assembles the files of a pack other than its manifest, in pieces, because the tensors are far larger than
the rest and must not be copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ..adapter_methods import Tensors
from ..io import TENSORS, safetensors
from ..manifest import manifest as m
from ..peft import layout

METADATA = {"format": "pt"}
"""The metadata that PEFT and transformers expect in the tensor file."""


def contents(
    manifest: m.Manifest, tensors: Tensors, extra: Mapping[str, bytes]
) -> dict[str, Iterable[bytes | memoryview]]:
    """Returns the pieces of every file: the tensors, PEFT's config if PEFT supports the method, and
    ``extra``.
    """
    config = layout.config_bytes(manifest)
    files = {
        TENSORS: _pieces(tensors),
        **{name: [data] for name, data in extra.items()},
    }
    return files if config is None else {**files, layout.CONFIG: [config]}


def encode_files(
    manifest: m.Manifest, tensors: Tensors, extra: Mapping[str, bytes] | None = None
) -> dict[str, bytes]:
    """Returns the bytes of every file of :func:`contents`."""
    return {name: b"".join(parts) for name, parts in contents(manifest, tensors, extra or {}).items()}


def _pieces(tensors: Tensors) -> Iterator[bytes | memoryview]:
    yield from safetensors.pieces(
        tensors, METADATA
    )  # a generator, so that the header is built only when it is needed
