"""Single-file adapters of other tools, looked at as they are: which format, what they change, how big; no base is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import AdapterpackError, ConfigError
from ..pack.inspect import summary
from ..pack.validate.checks.reading import unreadable
from ..pack.validate.finding import Report
from ..pack.validate.open_questions import NO_BASE
from .base import open_base
from .format import Format, Reading, Source, plain_name
from .pipeline import detect

_NO_DIGESTS = "digests and canary: the format carries none"


def inspect_file(path: Path) -> dict[str, Any]:
    """A summary of an adapter in one file as JSON values; modules are called as the file calls them.

    Raises:
        FormatError: malformed, or no adapter in a known format.
        Unsupported: it holds something that a pack cannot say, or is a pickle.
    """
    form, reading = _read(path)
    return {"kind": "adapter", "format": form.name, "path": str(path), **summary(reading.pack), "file_bytes": path.stat().st_size,
            "notes": list(reading.notes)}


def validate_file(path: Path, base: Path | None = None, full: bool = False) -> Report:
    """The report on an adapter in one file: reading it makes every check that it can bear; with ``base``, its modules are looked for."""
    try:
        _read(path, base)
    except ConfigError:
        raise  # a package is missing: that says nothing of the file
    except AdapterpackError as error:
        return Report("adapter", str(path), None, (unreadable(error, path.parent),))
    return Report("adapter", str(path), None, (), (*([] if base else [NO_BASE]), _NO_DIGESTS), incomplete=full)


def _read(path: Path, base: Path | None = None) -> tuple[Format, Reading]:
    form = detect(path)
    source = Source(path, plain_name(path.stem), None if base is None else open_base(base))
    return form, (form.outline if base is None else form.read)(source)
