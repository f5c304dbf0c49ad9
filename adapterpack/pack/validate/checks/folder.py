"""Checks which files a pack may contain, and that they are the ones that the manifest lists. AP101-AP107."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import cast

from ....errors import FormatError
from ....io import LARGE, TENSORS, in_hub_cache, map_file, read_file
from ....manifest import Outline
from ....manifest import manifest as m
from ... import MUTABLE
from .context import Budget
from .finding import Finding, check_rule, read_table

REGULAR = check_rule("AP101")
UNLISTED = check_rule("AP102")
MISSING = check_rule("AP103")
SIZE = check_rule("AP104")
DIGEST = check_rule("AP105")
FORBIDDEN = check_rule("AP106")
MAGIC = check_rule("AP107")

FORBIDDEN_SUFFIXES = frozenset(read_table("known_names")["forbidden_suffixes"])
TRAINER_STATE = re.compile(
    r"(optimizer|scheduler|scaler|training_args|rng_state(_[0-9]{1,6})?)\.(pt|pth|bin)"
)
"""Names of the files that transformers' Trainer leaves beside an adapter in a checkpoint."""
HEAD = 512
_LIST = "the list of the files"
NOTES = PurePosixPath(".cache", "huggingface")


def entries(folder: Path) -> list[Path]:
    """Returns the entries of a folder except ``.cache/huggingface``, where the official client keeps notes on
    a download and which nothing reads.
    """
    return [path for path in sorted(folder.iterdir()) if not _is_notes(path)]


def _is_notes(path: Path) -> bool:
    """Whether the path is that folder: a real folder, with nothing else in ``.cache``."""
    if path.name != NOTES.parts[0] or path.is_symlink() or not path.is_dir():
        return False
    inside = [*path.iterdir()]
    return (
        [entry.name for entry in inside] == [NOTES.name] and inside[0].is_dir() and not inside[0].is_symlink()
    )


def regular_files(folder: Path, budget: Budget | None = None) -> Iterator[Finding]:
    """AP101, checked before any file is opened. Links from a hub cache into its own blobs are allowed."""
    for path in (budget or Budget()).over(entries(folder), _LIST):
        if (path.is_symlink() and not in_hub_cache(path)) or not path.is_file():
            yield REGULAR.at(path.name, "only regular files may lie in a pack", file=path.name)


def forbidden_files(
    folder: Path, listed: frozenset[str] = frozenset(), budget: Budget | None = None
) -> Iterator[Finding]:
    """AP106-AP107 for files that are not listed; listed files are checked after they are read."""
    for path in (budget or Budget()).over(entries(folder), _LIST):
        if path.name in listed or not path.is_file():
            continue
        if Path(path.name.casefold()).suffix in FORBIDDEN_SUFFIXES:
            yield FORBIDDEN.at(path.name, "a file of a kind that may not lie in a pack", file=path.name)
        elif kind := magic_of(read_file(path, HEAD)):
            yield MAGIC.at(path.name, f"the file begins like {kind}", file=path.name, offset=0)


def closed_file_list(folder: Path, manifest: m.Manifest | Outline) -> Iterator[Finding]:
    """AP102-AP104: the folder contains exactly the listed files, each with the listed size."""
    listed = {entry.path: entry for entry in manifest.files}
    present = {path.name for path in entries(folder)}
    for name in sorted(present - listed.keys() - MUTABLE - {m.FILE_NAME}):
        yield UNLISTED.at(name, "a file that the manifest does not list", file=name)
    for name in sorted(listed.keys() - present):
        yield MISSING.at(name, "a listed file is missing", file=name)
    for name in sorted(listed.keys() & present):
        size = (folder / name).stat().st_size
        if size != listed[name].size:
            what = "truncated" if size < listed[name].size else "lengthened"
            yield SIZE.at(
                name,
                f"the file has {size} bytes, the manifest says {listed[name].size}: it was {what}",
                file=name,
                offset=min(size, listed[name].size),
            )


def read_files(folder: Path, manifest: m.Manifest, budget: Budget) -> dict[str, bytes]:
    """Returns the bytes of every listed file. Each file is opened and read once, up to the listed size.

    A large tensor file is memory-mapped; the mapping supports the operations used here: length, slices and
    the buffer protocol.

    Raises:
        Spent: the files exceed the budget.
        FormatError: an entry is not a regular file.
    """
    budget.require_memory(sum(entry.size for entry in manifest.files))
    return {entry.path: _content(folder / entry.path, entry.size + 1) for entry in manifest.files}


def _content(path: Path, limit: int) -> bytes:
    return (
        cast("bytes", map_file(path, limit))
        if path.name == TENSORS and limit > LARGE + 1
        else read_file(path, limit)
    )


def magic_bytes(contents: Mapping[str, bytes]) -> Iterator[Finding]:
    """AP107 for the listed files."""
    for name, data in contents.items():
        if kind := magic_of(data[:HEAD]):
            yield MAGIC.at(name, f"the file begins like {kind}", file=name, offset=0)


def read_manifest(path: Path) -> bytes:
    """Returns the manifest's bytes, read once.

    Raises:
        FormatError: the manifest is too large or not a regular file.
    """
    data = read_file(path, m.MAX_BYTES + 1)
    if len(data) > m.MAX_BYTES:
        raise FormatError(
            "the manifest is too large",
            where=path,
            expected=f"at most {m.MAX_BYTES} bytes",
            found=path.stat().st_size,
        )
    return data


_PREFIXES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive"), (b"PK\x05\x06", "a zip archive"), (b"PK\x07\x08", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"), (b"Rar!\x1a\x07", "a rar archive"),
    (b"\x1f\x8b", "a gzip stream"), (b"BZh", "a bzip2 stream"), (b"\xfd7zXZ\x00", "an xz stream"),
    (b"\x28\xb5\x2f\xfd", "a zstd stream"), (b"\x7fELF", "an ELF program"), (b"MZ", "a Windows program"),
    (b"\xcf\xfa\xed\xfe", "a Mach-O program"), (b"\xfe\xed\xfa\xcf", "a Mach-O program"),
    (b"\xca\xfe\xba\xbe", "a Java class"), (b"\x00asm", "a WebAssembly module"), (b"GGUF", "a GGUF model"),
    (b"\x93NUMPY", "a numpy file, which can hold a pickle"), (b"\x89HDF\r\n", "an HDF5 file"),
    (b"#!", "a script"), (b"%PDF-", "a PDF"),
    *((bytes((0x80, protocol)), "a pickle") for protocol in range(2, 6)),
)  # fmt: skip
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|script|svg|iframe|\?php)", re.IGNORECASE)
_TEXT_PICKLE = re.compile(rb"\(?c[A-Za-z_][A-Za-z0-9_.]*\n[A-Za-z_][A-Za-z0-9_.]*\n")


def magic_of(head: bytes) -> str | None:
    """Returns what kind of forbidden file begins with ``head``, or None.

    Example:
        >>> magic_of(b"PK\\x03\\x04rest"), magic_of(b"  <HTML>"), magic_of(b"# tickets")
        ('a zip archive', 'a web page', None)
    """
    if head[4:9] == b"\0\0\0\0{":
        return None  # safetensors: its first bytes are the length of the header and may look like anything
    for prefix, kind in _PREFIXES:
        if head.startswith(prefix):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive"
    if _PAGE.match(head):
        return "a web page"
    return "a pickle" if _TEXT_PICKLE.match(head) else None
