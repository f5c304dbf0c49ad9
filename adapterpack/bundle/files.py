"""Compares the files of a bundle with the list in its manifest: the bytes must match, and a session must read
no file outside of the list.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ..base import CARRIED
from ..errors import ConfigError, FormatError, nearest
from ..io import Identity, identity, require_unchanged
from ..io.file_hashes import file_hashes
from ..manifest import FILE_NAME as PACK
from ..manifest import Manifest
from ..pack import SIGNATURE
from ..pack.validate.checks import SAME
from ..tasks import MAIN
from .decoder_graph import graphs_of
from .manifest import FILE_NAME, Bundle, BundledAdapter, adapter_file, graph_file

VERIFY = ("full", "cached", "off")
"""How a session compares files with the manifest: it hashes all files, only those that have changed since
they were last hashed, or none.
"""


class FileDifference(NamedTuple):
    """A listed file that differs from the one on disk; ``found`` is None if it is missing."""

    path: str
    expected: str
    found: str | None


def differences(
    folder: Path, bundle: Bundle, *, again: bool = False, watch: Callable[[], None] | None = None
) -> Iterator[FileDifference]:
    """Yields every listed file that is missing, or has another size or other bytes.
    :func:`adapterpack.io.file_hashes.file_hashes` describes ``again`` and ``watch``.
    """
    there = {entry.path: folder / entry.path for entry in bundle.files if _is_regular(folder, entry.path)}
    sizes = {name: identity(path).size for name, path in there.items()}
    # Files of another size differ anyway and need not be hashed.
    whole = {entry.path: there[entry.path] for entry in bundle.files if sizes.get(entry.path) == entry.size}
    hashes = file_hashes(whole, again=again, watch=watch)
    for entry in bundle.files:
        if entry.path not in there:
            yield FileDifference(entry.path, f"{entry.size} bytes", None)
        elif entry.path not in whole:
            yield FileDifference(entry.path, f"{entry.size} bytes", f"{sizes[entry.path]} bytes")
        elif hashes[entry.path] != entry.sha256:
            yield FileDifference(entry.path, f"sha256 {entry.sha256}", hashes[entry.path])


def _is_regular(folder: Path, path: str) -> bool:
    """Returns whether a path is a regular file, and neither it nor a folder above it is a link."""
    steps = [folder.joinpath(*parts) for parts in itertools.accumulate((part,) for part in path.split("/"))]
    return steps[-1].is_file() and not any(step.is_symlink() for step in steps)


def present(folder: Path) -> set[str]:
    """Returns the relative paths of all files in a bundle's folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def irregular(folder: Path) -> Iterator[str]:
    """Yields whatever in a bundle's folder is neither a file nor a folder: links, pipes, devices."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield path.relative_to(folder).as_posix()


def refuse_other_files(folder: Path, bundle: Bundle) -> None:
    """Checks that a bundle's folder has no file that its manifest does not list, besides its signature.

    Raises:
        FormatError: it has one.
    """
    if extra := sorted(present(folder) - {entry.path for entry in bundle.files} - {FILE_NAME, SIGNATURE}):
        raise FormatError(
            "a file in the bundle is not in its manifest",
            where=folder / extra[0],
            remedy="remove it, or export again",
        )


def required_files(bundle: Bundle) -> set[str]:
    """Returns the files that a bundle needs, whatever its list says: graphs, packs, and in ``inputs`` mode
    the adapter files.
    """
    graphs = {graph_file(part) for part in graphs_of(bundle)}
    packs = {f"{adapter.path}/{PACK}" for adapter in bundle.adapters}
    slotted = bundle.adapters if bundle.mode == "inputs" else ()
    values = [adapter_files(Path(), bundle, adapter) for adapter in slotted]
    return graphs | packs | {path.as_posix() for files in values for path in files.values()}


def adapter_files(folder: Path, bundle: Bundle, adapter: BundledAdapter) -> dict[str, Path]:
    """Returns the files with an adapter's values in a bundle of the mode ``inputs``, by part."""
    parts = {site.part for site in bundle.sites.values() if site.fields} | {MAIN}
    return {part: folder / adapter_file(adapter.path, part) for part in parts}


def has_other_tokenizer(bundle: Bundle, pack: Manifest) -> bool:
    """Returns whether a pack was trained with another ``tokenizer.json`` than the bundle has. False if either
    is unknown.
    """
    trained = pack.tokenizer and pack.tokenizer.tokenizer_json
    own = next((entry.sha256 for entry in bundle.files if entry.path == "tokenizer.json"), None)
    return None not in (trained, own) and trained not in (own, SAME)


def require_in_list(folder: Path, bundle: Bundle, paths: Iterable[Path]) -> None:
    """Checks that the manifest lists the files from which a graph reads its weights.

    Raises:
        FormatError: the manifest lacks a file.
    """
    listed = {entry.path for entry in bundle.files}
    for path in sorted(paths):
        if path.relative_to(folder).as_posix() not in listed:
            raise _strange(path)


def _strange(path: Path) -> FormatError:
    return FormatError(
        "a session would read a file that the bundle's manifest does not list",
        where=path,
        remedy="remove the file, or export again",
    )


def require_files(folder: Path, bundle: Bundle, verify: str) -> dict[Path, Identity]:
    """Checks that a session will read what the manifest lists and nothing else.

    Returns:
        The identities of the files before the comparison, for :func:`require_same`; empty if ``verify`` is
        ``off``.

    Raises:
        ConfigError: ``verify`` is none of :data:`VERIFY`.
        FormatError: a listed file is missing or was altered, or the list lacks one that a session reads.
    """
    if verify not in VERIFY:
        raise ConfigError(
            "unknown way to verify a bundle",
            found=repr(verify),
            expected=", ".join(VERIFY),
            remedy=nearest(verify, VERIFY),
        )
    if verify == "off":
        return {}
    listed = {entry.path for entry in bundle.files}
    files = {folder / name: identity(folder / name) for name in sorted(listed) if _is_regular(folder, name)}
    if strange := sorted(
        (required_files(bundle) | {name for name in CARRIED if os.path.lexists(folder / name)}) - listed
    ):
        raise _strange(folder / strange[0])
    for wrong in differences(folder, bundle, again=verify == "full"):
        raise FormatError(
            "a file of the bundle is not the one that its manifest lists",
            where=folder / wrong.path,
            expected=wrong.expected,
            found=wrong.found or "no file",
            remedy="copy the bundle again, or export again",
        )
    return files


def require_same(files: Mapping[Path, Identity]) -> None:
    """Checks, after files were read by name, that they are still the files that were compared. A file that
    was swapped and restored in between shows by its change time.

    Raises:
        ChangedError: a file was swapped or altered.
    """
    for path, before in files.items():
        require_unchanged(path, before, exact=True)
