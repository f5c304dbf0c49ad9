"""Checks data files before a library reads them: refuses compressed files, overlong rows and deep nesting,
and names the line.

The readers that ``datasets`` uses have no limits of their own: a small hostile file can crash the process or
exhaust its memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import ConfigError, FormatError, storage_errors
from ...io import open_regular, whole
from ...sandbox.limits import SandboxLimits
from ...sandbox.sandbox import Sandbox

MAX_ROW = 16 << 20
"""The most bytes in a line, or in a string where rows are not lines."""
MAX_DEPTH = 64
"""The most levels of nesting in a row: the readers have no limit, and a deep enough row crashes the
process.
"""
MAX_COLUMNS = 1000
MAX_GROUP = 1 << 30
"""The most uncompressed bytes in a parquet row group, which readers load as a whole."""
_MEMORY = 512 << 20
_COPIES = 2
_SECONDS = 5.0
_BYTES_A_SECOND = 4 << 20
_ROWS = 64
"""How many rows are unpacked at a time."""
_BLOCK = 1 << 20
_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_WHOLE_TEXTS = re.compile(rb'(?:[^"]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
_PLAIN = frozenset({".csv", ".tsv", ".txt"})
"""Text files other than JSON; their encoding is checked here, since JSON readers check it themselves."""
_SPACE = b" \t\r\n\xef\xbb\xbf"
_STEP = np.array([(byte in b"[{") - (byte in b"]}") for byte in range(256)], np.int8)
_PACKED = (
    b"\x1f\x8b",
    b"PK\x03\x04",
    b"\xfd7zXZ",
    b"BZh",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
    b"7z\xbc\xaf",
    b"Rar!",
)
"""The first bytes of compressed files, which ``datasets`` would unpack whatever their name."""


def require_bounded(path: Path, name: object = None) -> None:
    """Checks the lines of a text file, or the index and rows of a parquet file, against the limits; errors
    call the file ``name``.

    Raises:
        StorageError: it cannot be read.
        ConfigError: it is compressed, or a row exceeds a limit.
    """
    name = name or path
    with storage_errors(name):
        kind = path.suffix.lower()
        size = path.stat().st_size
    if not size:
        return
    if kind == ".parquet":
        _require_bounded_parquet(path, size, name)
        return
    with open_regular(path) as file, storage_errors(name), whole(file) as data:
        if data[:8].startswith(_PACKED):
            raise ConfigError("the data file is packed", where=name, expected=kind, remedy="unpack it first")
        # A JSON file may be a single list of all rows, on one line.
        one_list = kind == ".json" and data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        depth, line = 0, 1
        for start, stop in _pieces(data, name) if one_list else _blocks(data, name):
            if kind in _PLAIN:
                _require_utf8(data[start:stop], f"{name}, from line {line} on")
            if kind in {".json", ".jsonl"}:
                # With strings removed, brackets are structure: their running sum is the depth at every byte.
                marks = np.frombuffer(_STRINGS.sub(b"-", data[start:stop]).translate(None, _SPACE), np.uint8)
                steps = _STEP[marks]
                levels = depth + np.cumsum(steps, dtype=np.int32)
                # A scalar at the top level; the reader crashes on null.
                if np.any((levels == 0) & (steps == 0)):
                    raise ConfigError("a row must be an object", where=RowPlace((path,), (name,)))
                if levels.max(initial=0) > MAX_DEPTH:
                    raise ConfigError(
                        "a row is nested too deeply",
                        where=f"{name}, from line {line} on",
                        expected=f"at most {MAX_DEPTH} levels",
                        found=int(levels.max()),
                    )
                depth = max(int(levels[-1]), 0) if len(levels) else depth
            line += data[start:stop].count(b"\n")


def _require_utf8(text: bytes, where: object) -> None:
    """Raises unless the text is UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        around = text[max(error.start - 20, 0) : error.start + 20].decode("utf-8", "replace").strip()
        raise ConfigError(
            "the file is not in UTF-8",
            where=where,
            found=repr(around),
            remedy="save it in UTF-8, which spreadsheets call CSV UTF-8, or change it by "
            "iconv -f WINDOWS-1252 -t UTF-8",
        ) from error


def _require_bounded_parquet(path: Path, size: int, name: object) -> None:
    """Checks the columns, levels and row groups in a parquet file's index, then its rows, in the sandbox: a
    small file may expand to any size.

    Raises:
        ConfigError: it is not a parquet file, or exceeds a limit.
    """
    sandbox = Sandbox(
        f"{__name__}:read_through",
        SandboxLimits(_MEMORY + _COPIES * size, _SECONDS + size / _BYTES_A_SECOND),
        kept=0,
    )
    try:
        problem = sandbox.run(str(path.resolve()).encode(), "the data cannot be read", where=name)
    except FormatError as error:
        raise ConfigError(error.what, where=name, expected="rows as parquet") from error
    if problem:
        what, expected, found = json.loads(problem)
        raise ConfigError(what, where=name, expected=expected, found=found)


def read_through(request: bytes) -> bytes:
    """Checks a parquet file, in the sandbox's process: takes its path, returns nothing or, as JSON, the limit
    that it exceeds.
    """
    problem = _problem(request.decode())
    return b"" if problem is None else json.dumps(problem).encode()


def _problem(path: str) -> tuple[str, str, int] | None:
    """Returns the first limit that a parquet file exceeds, as (problem, expected, found), or None."""
    import pyarrow.parquet as pq  # noqa: PLC0415 - only the other process needs these
    import pyarrow.types as kinds  # noqa: PLC0415

    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        if (count := len(file.schema)) > MAX_COLUMNS:
            return "the data has very many columns", f"at most {MAX_COLUMNS}", count
        if (
            depth := max((file.schema.column(number).path.count(".") for number in range(count)), default=0)
        ) > MAX_DEPTH:
            return "a row is nested too deeply", f"at most {MAX_DEPTH} levels, a list being two", depth
        groups = [file.metadata.row_group(number).total_byte_size for number in range(file.num_row_groups)]
        if max(groups, default=0) > MAX_GROUP:
            return "a group of rows is too large", f"at most {MAX_GROUP} bytes", max(groups)
        for number in range(file.num_row_groups):
            unpacked = 0
            for batch in file.iter_batches(_ROWS, [number], use_threads=False):
                columns = [
                    column.dictionary_decode() if kinds.is_dictionary(column.type) else column
                    for column in batch.columns
                ]
                unpacked += sum(column.nbytes for column in columns)
                if unpacked > MAX_GROUP:
                    return "a group of rows is too large", f"at most {MAX_GROUP} bytes", unpacked
                if (longest := max(map(_longest, columns), default=0)) > MAX_ROW:
                    return "a text is too long", f"at most {MAX_ROW} bytes", longest
    return None


def require_short_texts(rows: Any, where: object) -> None:
    """Raises if a string in the loaded rows is too long.

    Raises:
        ConfigError: a string is too long.
    """
    for name, column in zip(rows.column_names, rows.data.columns, strict=True):
        if (longest := _longest(column)) > MAX_ROW:
            raise ConfigError(
                "a text is too long",
                where=f"{where}, column {name}",
                expected=f"at most {MAX_ROW} bytes",
                found=longest,
            )


def _longest(column: Any) -> int:
    """Returns the bytes of the longest text in a column of a table; 0 if it holds no texts."""
    import pyarrow.compute as pc  # noqa: PLC0415 - what datasets is made of
    import pyarrow.types as kinds  # noqa: PLC0415

    if not (kinds.is_string(column.type) or kinds.is_large_string(column.type)):
        return 0
    return pc.max(pc.binary_length(column)).as_py() or 0


class RowPlace(NamedTuple):
    """The location of an error in one of several files, called by their ``names``. As text it includes the
    first line that is not a JSON object, if the file has a row per line.
    """

    paths: Sequence[Path]
    names: Sequence[object]

    def __str__(self) -> str:
        for path, name in zip(self.paths, self.names, strict=True):
            if path.suffix.lower() == ".jsonl" and path.is_file():
                with path.open("rb") as file:
                    for number, text in enumerate(file, 1):
                        if flaw_of(text) is not None:
                            return f"{name}, line {number}"
        return str(self.names[0]) + (f" and {len(self.names) - 1} more" if len(self.names) > 1 else "")


def flaw_of(line: bytes) -> str | None:
    """Returns why a line is not a row, or None; None for a blank line, too, which readers skip."""
    try:
        return None if not line.strip() or isinstance(json.loads(line), dict) else "a row must be an object"
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"


def _pieces(data: bytes | mmap, name: object) -> Iterator[tuple[int, int]]:
    """Yields start and end of consecutive pieces of JSON, cut outside of strings."""
    start = 0
    size = len(data)
    while start < size:
        stop = min(start + _BLOCK, size)
        end = start + _whole_texts(data[start:stop])
        # A string is longer than the block, so enlarge it.
        while end == start and stop < size and stop - start <= MAX_ROW:
            stop = min(2 * stop - start, size)
            end = start + _whole_texts(data[start:stop])
        long = stop - start > MAX_ROW
        if long and (longest := max(map(len, _STRINGS.findall(data[start:stop])), default=0)) > MAX_ROW:
            raise ConfigError(
                "a text is too long", where=name, expected=f"at most {MAX_ROW} bytes", found=longest
            )
        # For a string that never ends, take the rest; the reader reports it.
        end = end if end > start else stop
        yield start, end
        start = end


def _whole_texts(piece: bytes) -> int:
    """Returns how many bytes at the start of a piece contain only complete strings."""
    found = _WHOLE_TEXTS.match(piece)
    return 0 if found is None else found.end()


def _blocks(data: bytes | mmap, name: object) -> Iterator[tuple[int, int]]:
    """Yields start and end of consecutive blocks of complete lines."""
    start = 0
    line = 1
    size = len(data)
    while start < size:
        stop = min(start + _BLOCK, size)
        end = size if stop == size else data.rfind(b"\n", start, stop) + 1
        # The block contains no end of line, so extend it to the next.
        if not end:
            end = data.find(b"\n", stop) + 1 or size
            if end - start > MAX_ROW:
                raise ConfigError(
                    "a row is too long",
                    where=f"{name}, line {line}",
                    expected=f"at most {MAX_ROW} bytes",
                    found=end - start,
                )
        yield start, end
        line += data[start:end].count(b"\n")
        start = end
