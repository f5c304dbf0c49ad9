"""Imports the ``gguf`` package, an extra, for block types and tensor names that are not implemented here."""

from __future__ import annotations

from typing import Any

from ...extras import needed_by


def library() -> Any:
    """Returns the ``gguf`` package.

    Raises:
        MissingExtra: the package is not installed.
    """
    with needed_by("GGUF"):
        import gguf  # noqa: PLC0415 - an extra
    return gguf
