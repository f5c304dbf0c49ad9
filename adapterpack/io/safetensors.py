"""Reads safetensors strictly and writes them deterministically, with numpy alone.

Format: an 8-byte little-endian header length, a JSON header, then the bytes. The reader refuses what the
reference reader lets pass: duplicate names, extra fields, a header that does not begin with ``{``, padding
other than spaces, holes, overlaps, trailing bytes.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import mmap
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from ..errors import FormatError, excerpt, storage_errors
from ..paths import StrPath
from . import strict_json
from .safe_open import open_regular, read_at_most, write_parts
from .strict_json import Json

MAX_HEADER = 16 << 20
MAX_TENSORS = 50_000
MAX_RANK = 8
MAX_NAME = 512
PAGE = 4096
"""Bytes of the pages that file systems share between files."""
_MAX_COUNT = 1 << 59
"""The most elements of an array: at 16 bytes each, as many as can be addressed."""

_KINDS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(getattr(np if hasattr(np, kind) else ml_dtypes, kind)) for name, kind in _KINDS.items()
}
"""The dtypes by their names in the format."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = frozenset(name for name in DTYPES if name.startswith(("F", "BF")))


class TensorInfo(NamedTuple):
    """The position of one tensor: ``offset`` in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open safetensors file: the header is parsed and checked, the bytes are mapped read-only and copied
    only on request.

    ``private`` reads the bytes into memory at once, so that nobody can change what was checked.

    Raises:
        FormatError: the file breaks a rule of the format.

    Example:
        >>> import tempfile; path = Path(tempfile.mkdtemp()) / "x.safetensors"
        >>> write(path, {"a": np.zeros((2, 3), np.float32)})
        >>> SafetensorsFile(path).read("a").shape
        (2, 3)
    """

    _watch: Callable[[], None] | None = None

    def __init__(self, path: StrPath, private: bool = False) -> None:
        self.path = Path(path)
        self._bytes: bytes | mmap.mmap
        with open_regular(self.path) as file:
            self.size = os.fstat(file.fileno()).st_size
            self.tensors, self.metadata = parse_header(file, self.size, self.path)
            if private:
                file.seek(0)
                self._bytes = read_at_most(file, self.size)
            else:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @contextmanager
    def watched(self, watch: Callable[[], None]) -> Iterator[None]:
        """Calls ``watch`` at every access to a tensor inside the block; an exception from it ends the
        work.
        """
        before = self._watch
        self._watch = watch
        try:
            yield
        finally:
            self._watch = before

    def buffer(self, name: str) -> memoryview:
        """Returns the bytes of a tensor, without a copy."""
        if self._watch is not None:
            self._watch()
        info = self.tensors[name]
        return memoryview(self._bytes)[info.offset : info.offset + info.nbytes]

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as a read-only view of the mapped file.

        If the length of the header leaves its elements unaligned, returns a copy, since compiled code needs
        aligned data.
        """
        info = self.tensors[name]
        value = np.frombuffer(self.buffer(name), dtype=DTYPES[info.dtype]).reshape(info.shape)
        return value if value.flags.aligned else value.copy()

    def is_view(self, name: str, value: np.ndarray) -> bool:
        """Whether an array is the tensor of that name in this file, in place."""
        if name not in self.tensors:
            return False
        whole = self.read(name)
        return (
            value.dtype == whole.dtype and value.shape == whole.shape and place_of(value) == place_of(whole)
        )


class HeldFile(SafetensorsFile):
    """A safetensors file whose bytes are already in memory, so that the same bytes are hashed, parsed and
    used.

    Raises:
        FormatError: the bytes break a rule of the format.
    """

    def __init__(self, data: bytes, path: Path) -> None:
        self.path = path
        self.size = len(data)
        self._bytes = data
        end = 8 + min(int.from_bytes(data[:8], "little"), MAX_HEADER)
        self.tensors, self.metadata = parse_header(io.BytesIO(data[:end]), len(data), path)


def parse_header(file: IO[bytes], size: int, where: object) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Returns the tensors, ordered by offset, and the metadata of an open safetensors file of ``size`` bytes.

    Raises:
        FormatError: the header breaks a rule, or does not describe exactly the bytes that follow.
    """
    if size < 8:
        raise FormatError("the file is too short to be safetensors", where=where, found=f"{size} bytes")
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise FormatError(
            "the safetensors header length is out of range: the file is truncated or not safetensors",
            where=where,
            expected=f"at most {min(MAX_HEADER, size - 8)} bytes",
            found=length,
            remedy="fetch the file again from where it came",
        )
    raw = file.read(length)
    if raw[:1] != b"{":
        raise FormatError("the safetensors header must begin with '{'", where=where, found=repr(raw[:1]))
    body = raw.rstrip(b" ")
    if not body.endswith(b"}"):
        raise FormatError(
            "the safetensors header may be padded with spaces only", where=where, found=repr(body[-1:])
        )
    header = strict_json.loads(body, where, MAX_HEADER)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # mlx writes null, and the reference reader takes it
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("safetensors metadata must map strings to strings", where=where)
    if len(header) > MAX_TENSORS:
        raise FormatError(
            "too many tensors", where=where, expected=f"at most {MAX_TENSORS}", found=len(header)
        )
    data_start = 8 + length
    infos = sorted(
        (_entry(name, entry, data_start, where) for name, entry in header.items()),
        key=lambda i: (i.offset, i.nbytes, i.name),
    )
    end = data_start
    for info in infos:
        if info.offset != end:
            what = "tensors overlap" if info.offset < end else "bytes that belong to no tensor"
            raise FormatError(
                what, where=f"{where}, tensor {info.name}", expected=f"offset {end}", found=info.offset
            )
        end += info.nbytes
    if end != size:
        what = "the file is truncated" if end > size else "bytes after the last tensor"
        raise FormatError(
            what,
            where=where,
            expected=f"{end} bytes",
            found=size,
            remedy="fetch the file again from where it came",
        )
    return {info.name: info for info in infos}, metadata


def _entry(name: str, entry: Any, data_start: int, where: object) -> TensorInfo:
    """Checks the header entry of one tensor and returns its position."""
    place = f"{where}, tensor {name[:MAX_NAME]}"
    _check_name(name, place)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("a tensor entry must have exactly dtype, shape and data_offsets", where=place)
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError("unknown dtype", where=place, expected=", ".join(DTYPES), found=excerpt(dtype))
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise FormatError(
            "a shape must be a short list of natural numbers", where=place, found=excerpt(shape)
        )
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(
            "data_offsets must be two ascending natural numbers", where=place, found=excerpt(offsets)
        )
    nbytes = offsets[1] - offsets[0]
    expected = DTYPES[dtype].itemsize * count_of(shape, place)
    if nbytes != expected:
        raise FormatError(
            "shape and dtype do not fit the bytes", where=place, expected=f"{expected} bytes", found=nbytes
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _check_name(name: str, where: object) -> None:
    """Raises if the format does not allow a tensor name."""
    fits = 0 < len(name) <= MAX_NAME
    if not fits or (not name.isprintable() and any(unicodedata.category(c) in {"Cc", "Cs"} for c in name)):
        raise FormatError(
            "a tensor name that the format does not allow",
            where=where,
            expected=f"1 to {MAX_NAME} characters, none of them a control character",
            found=excerpt(name),
        )


def _naturals(value: Any) -> bool:
    """Whether a value is a list of natural numbers."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def count_of(shape: Iterable[int], where: object) -> int:
    """Returns the number of elements of an array with this shape.

    Raises:
        FormatError: no array can have this shape: one axis is empty, and the others are larger than anything
            that can be addressed.

    Example:
        >>> count_of((2, 3), "x"), count_of((0, 3), "x"), count_of((), "x")
        (6, 0, 1)
    """
    count = span = 1
    for extent in shape:
        count = count * extent
        span = span * (extent or 1)
    # A shape with elements is checked against its bytes elsewhere.
    if not count and span > _MAX_COUNT:
        raise FormatError("a shape that no array can have", where=where, found=excerpt(tuple(shape)))
    return count


def all_finite(value: np.ndarray) -> bool:
    """Whether an array of any dtype of this format contains neither NaN nor infinity.

    Example:
        >>> all_finite(np.array([1e300])), all_finite(np.array([np.nan], DTYPES["BF16"]))
        (True, False)
    """
    if dtype_name(value.dtype) not in FLOATS:
        return True
    squares = np.vdot(value, value) if value.dtype.kind == "f" and value.dtype.itemsize >= 4 else np.inf
    # one number tells, unless the sum alone is too large
    return math.isfinite(squares) or bool(np.isfinite(value).all())


def dtype_name(dtype: np.dtype) -> str:
    """Returns the safetensors name of a numpy dtype.

    Raises:
        FormatError: safetensors has no such dtype.
    """
    name = _NAMES.get(np.dtype(dtype))
    if name is None:
        raise FormatError("safetensors cannot hold this dtype", expected=", ".join(DTYPES), found=dtype)
    return name


def plan(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
    start: int | None = None,
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Returns the header bytes and the position of each tensor for a file with these ``(name, dtype,
    shape)``, in order.

    So a merge can write every tensor at its final offset before the others exist. With ``start``, a multiple
    of 8, the header is padded so that it ends at the same position in a page (4 KiB) as ``start``.

    Raises:
        FormatError: the reader would refuse the file, for a tensor's name or rank, the number of tensors, or
            the length of the header.
    """
    entries: Json = {"__metadata__": dict(metadata)} if metadata else {}
    sizes = []
    offset = 0
    for name, dtype, shape in tensors:
        _check_name(name, f"tensor {name[:MAX_NAME]}")
        if name == "__metadata__" or name in entries or len(shape) > MAX_RANK:
            raise FormatError(
                "a tensor that safetensors cannot hold: reserved or repeated name, or too many dimensions",
                where=f"tensor {name}",
                expected=f"at most {MAX_RANK} dimensions",
                found=f"shape {list(shape)}",
            )
        nbytes = DTYPES[dtype].itemsize * math.prod(map(int, shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        sizes.append((name, dtype, tuple(shape), offset, nbytes))
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    # With ``start``, align to pages as in the source, so that file systems can share unchanged pages between
    # the files.
    text += b" " * (-len(text) % 8 if start is None or start % 8 else (start - 8 - len(text)) % PAGE)
    if len(text) > MAX_HEADER or len(sizes) > MAX_TENSORS:
        raise FormatError(
            "too many tensors for one safetensors file",
            expected=f"at most {MAX_TENSORS} and a header of {MAX_HEADER} bytes",
            found=f"{len(sizes)} tensors, {len(text)} bytes",
        )
    header = len(text).to_bytes(8, "little") + text
    return header, {
        name: TensorInfo(name, dtype, shape, len(header) + start, nbytes)
        for name, dtype, shape, start, nbytes in sizes
    }


def write(
    path: StrPath | io.BytesIO,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes ``tensors`` to ``path``, wide dtypes first, then by name, so that equal content gives equal
    bytes.

    Raises:
        FormatError: a dtype, a name or a shape that safetensors does not have.
        StorageError: the file system refuses.
    """
    parts = pieces(tensors, metadata)
    if isinstance(path, io.BytesIO):
        path.writelines(parts)
        return
    with storage_errors(path):
        write_parts(Path(path), parts, "xb")


def pieces(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yields the bytes of the file that :func:`write` would write, without copying: the header, then every
    tensor in order.

    Raises:
        FormatError: a dtype, a name or a shape that safetensors does not have.

    Example:
        >>> [len(piece) for piece in pieces({"a": np.zeros((2, 3), np.float32)})]
        [72, 24]
    """
    kinds = {name: (np.dtype(value.dtype), value.shape) for name, value in tensors.items()}
    ordered = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    header, _ = plan(((name, dtype_name(kinds[name][0]), kinds[name][1]) for name in ordered), metadata)
    return itertools.chain([header], (raw(tensors[name]) for name in ordered))


def place_of(value: np.ndarray) -> int | None:
    """Returns the memory address of an array's bytes; None if the array is not contiguous in C order.

    Example:
        >>> whole = np.zeros((2, 3))
        >>> place_of(whole[1:]) == place_of(whole) + 24, place_of(whole.T)
        (True, None)
    """
    return int(value.__array_interface__["data"][0]) if value.flags.c_contiguous else None


def raw(value: np.ndarray) -> memoryview:
    """Returns the bytes of an array in C order; without a copy if it is contiguous.

    Example:
        >>> raw(np.array([1, 2], np.uint8)).tobytes()
        b'\\x01\\x02'
    """
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
