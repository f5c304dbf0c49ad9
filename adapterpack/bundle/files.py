"""Compares the files of a bundle with the list in its manifest: the same bytes, and no other file that a session would read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..base.checkpoint import CARRIED
from ..errors import ConfigError, FormatError, nearest
from ..io.file_hashes import file_hashes
from .manifest import FILE_NAME, STEP, Bundle, graph_file

VERIFY = ("full", "cached", "off")
"""How a session compares files with the manifest: all are hashed; those are that have changed since they were hashed before; none are."""


class Difference(NamedTuple):
    """A listed file that is not the one on disk; ``found`` is None where it is missing."""

    path: str
    expected: str
    found: str | None


def differences(folder: Path, bundle: Bundle, *, again: bool = False, watch: Callable[[], None] | None = None) -> Iterator[Difference]:
    """Every file that the manifest lists and that is missing, of another size, or has other bytes; see
    :func:`adapterpack.io.file_hashes.file_hashes` for ``again`` and ``watch``.
    """
    there = {entry.path: folder / entry.path for entry in bundle.files if (folder / entry.path).is_file()}
    sizes = {name: path.stat().st_size for name, path in there.items()}
    whole = {entry.path: there[entry.path] for entry in bundle.files if sizes.get(entry.path) == entry.size}
    hashes = file_hashes(whole, again=again, watch=watch)
    for entry in bundle.files:
        if entry.path not in there:
            yield Difference(entry.path, f"{entry.size} bytes", None)
        elif entry.path not in whole:
            yield Difference(entry.path, f"{entry.size} bytes", f"{sizes[entry.path]} bytes")
        elif hashes[entry.path] != entry.sha256:
            yield Difference(entry.path, f"sha256 {entry.sha256}", hashes[entry.path])


def unlisted(folder: Path, bundle: Bundle) -> list[str]:
    """Files in the bundle's folder that its manifest does not list."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return sorted(files - {entry.path for entry in bundle.files} - {FILE_NAME})


def require_files(folder: Path, bundle: Bundle, verify: str) -> None:
    """Checks that a session reads what the manifest lists and nothing else.

    Raises:
        ConfigError: ``verify`` is none of :data:`VERIFY`.
        FormatError: a listed file is missing or was altered, or the list lacks one that a session reads.
    """
    if verify not in VERIFY:
        raise ConfigError("unknown way to verify a bundle", found=repr(verify), expected=", ".join(VERIFY), remedy=nearest(verify, VERIFY))
    if verify == "off":
        return
    listed = {entry.path for entry in bundle.files}
    graphs = {graph_file(part) for part in (*bundle.parts, *((STEP,) if bundle.in_place else ()))}
    strange = sorted((graphs | {name for name in CARRIED if (folder / name).exists()}) - listed)
    if strange:
        raise FormatError("a session would read a file that the bundle's manifest does not list", where=folder / strange[0],
                          remedy="remove the file, or export again")
    for wrong in differences(folder, bundle, again=verify == "full"):
        raise FormatError("a file of the bundle is not the one that its manifest lists", where=folder / wrong.path,
                          expected=wrong.expected, found=wrong.found or "no file", remedy="copy the bundle again, or export again")
