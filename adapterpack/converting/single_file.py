"""Inspects and validates adapters of other tools, in one file or in a folder, without a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import AdapterpackError, ConfigError
from ..manifest import plain_name
from ..pack.inspect import summary
from ..pack.validate import NO_BASE
from ..pack.validate.checks import Report, unreadable
from .base import open_base
from .format import ConversionSource, Format, Reading
from .pipeline import detect

_NO_DIGESTS = "digests and canary: the format carries none"


def inspect_file(path: Path) -> dict[str, Any]:
    """Returns a summary of another tool's adapter as JSON values; modules keep the names that they have
    there.

    Raises:
        FormatError: the adapter is malformed, or not in a supported format.
        Unsupported: a pack cannot express the adapter, or it is a pickle.
    """
    form, reading = _read(path)
    return {
        "kind": "adapter",
        "format": form.name,
        "path": str(path),
        **summary(reading.pack),
        "file_bytes": form.file_of(path).stat().st_size,
        "notes": list(reading.notes),
    }


def validate_file(path: Path, base: Path | None, full: bool) -> Report:
    """Returns the report on another tool's adapter: reading it makes all possible checks; with ``base`` it
    looks up the modules there.
    """
    try:
        _read(path, base)
    except ConfigError:
        raise  # a missing package says nothing about the file
    except AdapterpackError as error:
        return Report("adapter", str(path), None, (unreadable(error, path.parent),))
    return Report(
        "adapter", str(path), None, (), (*([] if base else [NO_BASE]), _NO_DIGESTS), incomplete=full
    )


def _read(path: Path, base: Path | None = None) -> tuple[Format, Reading]:
    form = detect(path)
    source = ConversionSource(path, plain_name(path.stem), None if base is None else open_base(base))
    return form, form.read(source)
