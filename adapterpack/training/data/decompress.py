"""Finds the data files that a source names, unpacks packed ones, and removes lines that are not rows."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ConfigError, StorageError, storage_errors
from ...hub.resolve import near_path
from ...io import open_regular, read_at_most, resolved_inside, scratch_folder, sha256_of, strict_json
from ...manifest.structs import Dataset
from ...tasks.data import DataReport
from ..config.sources import Source
from .limits import MAX_ROW, flaw_of
from .workbooks import write_lines


class FileKind(NamedTuple):
    """How ``datasets`` reads a kind of files: the builder and its options; ``lines`` means that each
    non-blank line is a row. ``write_lines`` copies a file that ``datasets`` cannot read as JSON lines.
    """

    builder: str
    options: Mapping[str, Any] = {}
    lines: bool = False
    write_lines: Callable[[Path, Path], Path] | None = None


KINDS: Mapping[str, FileKind] = {
    ".json": FileKind("json"),
    ".jsonl": FileKind("json", lines=True),
    ".csv": FileKind("csv"),
    ".tsv": FileKind("csv", {"sep": "\t"}),
    ".txt": FileKind("text"),
    ".parquet": FileKind("parquet"),
    ".xlsx": FileKind("json", write_lines=write_lines),
}
"""Maps file endings to how such files are read."""
_GZIP = ".gz"
_QUOTED = re.compile(rb'"[^"]*"')
_TIMES = 200
_LEAST = 64 << 20
"""A packed file may be so many times as large unpacked, and so large at least."""
_BLOCK = 1 << 20


def kind_of(path: Path) -> str | None:
    """Returns the ending that decides how a data file is read, of the content if it is compressed; None for
    other files.
    """
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    ending = (endings[:-1] if endings[-1:] == [_GZIP] else endings)[-1:]
    return ending[0] if ending and ending[0] in KINDS else None


def options_of(kind: str, path: Path) -> Mapping[str, Any]:
    """Returns the options with which ``datasets`` reads a file.

    A CSV file without commas in its first line is read with the separator that the line has: spreadsheets
    write semicolons in locales with decimal commas.
    """
    if kind != ".csv":
        return KINDS[kind].options
    with open_regular(path) as file:
        names = _QUOTED.sub(b"", read_at_most(file, _BLOCK).partition(b"\n")[0])
    return {"sep": next((mark for mark in ",;\t" if mark.encode() in names), ",")}


def part_of(split: str) -> str:
    """Returns the part of the data that a split expression selects from.

    Example:
        >>> part_of("train[:10%]")
        'train'
    """
    return re.split(r"[\[+]", split)[0]


def files_of(source: Source) -> list[Path]:
    """Returns the files that a source names; empty for a folder or a data set on the hub.

    Raises:
        StorageError: there is no such file.
        ConfigError: a file has an unknown ending.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        return []
    pattern = has_magic(str(path))
    # Path's takes no pattern of an absolute path
    names = glob(str(path), recursive=True) if pattern else []  # noqa: PTH207
    files = sorted(Path(name) for name in names if Path(name).is_file()) if pattern else [path]
    named = pattern or kind_of(path) is not None or path.is_file()
    if not named and source.path[:1] not in {".", "/", "~"}:
        return []
    if not files or not all(map(Path.is_file, files)):
        raise StorageError(
            "there is no such data file",
            where=source.path,
            remedy=f"{near_path(source.path)}check the path: it starts from the current folder",
        )
    if other := [file for file in files if kind_of(file) is None]:
        raise ConfigError(
            "the ending of a data file names no kind that is read",
            where=other[0],
            expected=", ".join(KINDS),
            found=other[0].suffix or "no ending",
            remedy="convert the file to one of these kinds, and name it by its ending",
        )
    if source.name or source.revision or source.data_files:
        raise ConfigError(
            "a data file has no such setting",
            where=source.path,
            found="name, revision or data_files",
            remedy="leave it out: folders and hub data sets have these",
        )
    return files


def files_below(folder: Path) -> list[Path]:
    """Returns the regular files in a folder of data, in order.

    Raises:
        FormatError: a link leads out of the folder.
        StorageError: the file system refuses.
    """
    with storage_errors(folder):
        found = sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    for path in found:
        resolved_inside(path, folder)
    return [path for path in found if path.is_file()]


def dataset_of(source: Source) -> Dataset:
    """Returns what a pack says of a source: the name and digest of its files, or the name and revision of a
    data set on the hub.

    Raises:
        StorageError: a file cannot be read.
    """
    files = files_of(source)
    if not files and Path(source.path).is_dir():
        files = files_below(Path(source.path))
    if not files:
        return {"id": source.path, "revision": source.revision, "digest": None}
    digests = [[path.name, sha256_of(path)] for path in files]
    digest = digests[0][1] if len(files) == 1 else hashlib.sha256(strict_json.canonical(digests)).hexdigest()
    return {"id": Path(source.path).name, "revision": None, "digest": f"sha256:{digest}"}


@contextmanager
def readable(files: Sequence[Path], report: DataReport) -> Iterator[tuple[list[Path], dict[str, Any]]]:
    """Yields files of one kind in a form that ``datasets`` can read, with options for it.

    These are the files themselves, or plain copies of compressed ones and, where bad rows are skipped, copies
    of just the lines that are rows. The copies exist as long as the block; so does the cache of ``datasets``
    if it has no writable folder.

    Raises:
        ConfigError: a compressed file is damaged, or expands beyond the limit.
    """
    kind = KINDS[str(kind_of(files[0]))]
    lines, convert = kind.lines, kind.write_lines
    if lines and len(files) == 1:
        report.line_of = _line_of(files[0], report)
    if not (convert or any(map(_is_packed, files)) or (lines and report.skips)) and _has_cache():
        yield list(files), {}
        return
    with scratch_folder() as folder:
        copies = []
        for number, file in enumerate(files):
            if convert:
                copy = convert(file, Path(folder, f"{number}.jsonl"))
            else:
                copy = _unpack(file, Path(folder, f"{number}{kind_of(file)}")) if _is_packed(file) else file
            if lines and report.skips:
                copy = _rows_alone(copy, Path(folder, f"rows-{number}{kind_of(file)}"), file, report)
            copies.append(copy)
        yield copies, {"cache_dir": str(folder), "keep_in_memory": True}


def _has_cache() -> bool:
    """Whether ``datasets`` can write its own cache folder; in a container it may have no home, or a read-only
    one.
    """
    from datasets import config  # noqa: PLC0415 - takes a second to import, and not all rows are its business

    place = Path(config.HF_DATASETS_CACHE)
    with suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
    return os.access(place, os.W_OK | os.X_OK)


def _is_packed(file: Path) -> bool:
    """Whether a file is compressed."""
    return file.suffix.lower() == _GZIP


def _line_of(file: Path, report: DataReport) -> Callable[[int], int | None]:
    """Returns a function from the number of a row to its line, in a file with a row per line; blank and bad
    lines are not rows.
    """

    @cache
    def lines() -> list[int]:
        with gzip.open(file) if _is_packed(file) else file.open("rb") as data:
            return [
                number for number, line in enumerate(data, 1) if line.strip() and -number not in report.bad
            ]

    return lambda row: lines()[row - 1] if row <= len(lines()) else None


def _unpack(file: Path, copy: Path) -> Path:
    """Decompresses a file; raises if it expands beyond the limit."""
    with storage_errors(file):
        most = max(_LEAST, _TIMES * file.stat().st_size)
    try:
        with open_regular(file) as packed, gzip.GzipFile(fileobj=packed) as data, copy.open("wb") as out:
            while block := data.read(_BLOCK):
                out.write(block)
                if out.tell() > most:
                    raise ConfigError(
                        "a packed file is far larger than it looks",
                        where=file,
                        expected=f"at most {most} bytes unpacked",
                    )
    except (EOFError, OSError, zlib.error) as error:
        raise ConfigError(
            f"the packed file cannot be unpacked: {error}", where=file, remedy="pack it again"
        ) from error
    return copy


def _rows_alone(source: Path, copy: Path, file: Path, report: DataReport) -> Path:
    """Copies the lines that are JSON objects and leaves the others blank, so that line numbers stay."""
    with storage_errors(source), source.open("rb") as lines, copy.open("wb") as out:
        for number, line in enumerate(iter(partial(lines.readline, MAX_ROW + 1), b""), 1):
            if len(line) > MAX_ROW:
                raise ConfigError(
                    "a row is too long", where=f"{file}, line {number}", expected=f"at most {MAX_ROW} bytes"
                )
            flaw = flaw_of(line)
            if flaw is not None:
                report.bad[-number] = f"{flaw} (at {file}, line {number})."
            out.write(line if flaw is None else b"\n")
    return copy
