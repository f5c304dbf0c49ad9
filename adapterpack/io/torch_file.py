"""Reads the tensors of a ``torch.save`` file without torch and without unpickling: no name in the file is
ever looked up.

Format: an uncompressed zip archive. ``data.pkl`` is a program for Python's pickle machine that builds the
tensors from their raw data in ``data/0``, ``data/1`` and so on. This module interprets the few steps that
such a program needs, on plain values, and refuses any other.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import FormatError, Unsupported, printable
from .safe_open import open_regular
from .safetensors import DTYPES, MAX_RANK, MAX_TENSORS

_MAX_PROGRAM = 16 << 20
_MOST_TIMES = 4
"""How many times the file's size its tensors may have in all; more than once, since tensors may be tied."""
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
"""Maps torch's storage classes to safetensors dtypes."""


class _Storage(NamedTuple):
    """The raw data of one or more tensors: the archive's record, the safetensors dtype, and the number of
    elements.
    """

    record: str
    dtype: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Name(NamedTuple):
    """A name in a module that the program refers to; never resolved."""

    module: str
    name: str


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_TENSOR = _Name("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Name("torch._utils", "_rebuild_parameter")
_DICT = _Name("collections", "OrderedDict")


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file by name.

    Raises:
        FormatError: the file is damaged.
        Unsupported: it holds anything else than tensors by name, or has an older form.
    """
    with open_regular(path) as file:
        try:
            return _read(file, path)
        except (
            zipfile.BadZipFile,
            ArithmeticError,
            AttributeError,
            EOFError,
            LookupError,
            RuntimeError,
            StopIteration,
            TypeError,
            ValueError,
        ) as error:
            raise FormatError(
                f"this is not a file of tensors that torch wrote: {printable(str(error)[:200])}",
                where=path,
                remedy="fetch it again from where it came",
            ) from error


def _read(file: Any, path: Path) -> dict[str, np.ndarray]:
    """Reads the archive within limits."""
    if file.read(2) != b"PK":
        raise Unsupported(
            "the file is of a form that torch wrote before 1.6",
            where=path,
            expected="a zip archive",
            remedy=(
                "load it with torch.load(path, weights_only=True), and save it with "
                "safetensors.torch.save_file"
            ),
        )
    with zipfile.ZipFile(file) as archive:
        records = records_in(archive)
        (program,) = (name for name in records if name.endswith("data.pkl"))
        folder = program.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        # Check sizes before reading: a zip archive can declare any.
        if records[program].file_size > _MAX_PROGRAM or (
            order in records and archive.read(order) != b"little"
        ):
            raise ValueError("its program is too long, or its numbers are of a machine of another kind")
        tensors = _put_together(archive.read(program), path)
        storages = {tensor.storage.record: tensor.storage for tensor in tensors.values()}
        size = file.seek(0, io.SEEK_END)
        made = sum(
            math.prod(tensor.shape) * DTYPES[tensor.storage.dtype].itemsize for tensor in tensors.values()
        )
        if (
            max(made // _MOST_TIMES, sum(records[f"{folder}data/{record}"].file_size for record in storages))
            > size
        ):
            raise ValueError("its records overlap, or its tensors do far more than it holds")
        numbers = {
            record: np.frombuffer(archive.read(f"{folder}data/{record}"), DTYPES[storage.dtype])
            for record, storage in storages.items()
        }
    return {name: _array(tensor, numbers[tensor.storage.record]) for name, tensor in tensors.items()}


def records_in(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Returns the records of an archive that compresses nothing, by name.

    Raises:
        ValueError: it is compressed, or has too many.
    """
    records = {info.filename: info for info in archive.infolist()}
    if len(records) > 2 * MAX_TENSORS or any(
        info.compress_type != zipfile.ZIP_STORED for info in records.values()
    ):
        raise ValueError("its archive is compressed, or has too many records")
    return records


def _array(tensor: _Tensor, numbers: np.ndarray) -> np.ndarray:
    """Returns a tensor as a separate array.

    Raises:
        ValueError: it exceeds its storage.
    """
    last = tensor.offset + sum(
        (width - 1) * stride for width, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    count = math.prod(tensor.shape)
    if (
        len(tensor.shape) > MAX_RANK
        or min((tensor.offset, *tensor.shape, *tensor.strides)) < 0
        or count > len(numbers)
        or (count and last >= len(numbers))
    ):
        raise ValueError("a tensor does not lie within its numbers")
    if not count:
        return np.empty(tensor.shape, numbers.dtype)
    strides = [stride * numbers.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(
        numbers[tensor.offset :], tensor.shape, strides, writeable=False
    ).copy()


def _put_together(program: bytes, path: Path) -> Mapping[str, _Tensor]:
    """Runs the program; returns the tensors by name.

    Raises:
        Unsupported: it calls or builds anything else.
    """
    made = _run(program, path)
    if not isinstance(made, dict) or not all(
        isinstance(name, str) and isinstance(one, _Tensor) for name, one in made.items()
    ):
        raise Unsupported(
            "the file holds something else than tensors by name",
            where=path,
            expected="a state dict",
            remedy="save the adapter again with save_pretrained",
        )
    return made


def _run(program: bytes, path: Path) -> Any:  # noqa: PLR0912 - a case for each step
    """Runs Python's pickle machine, reduced to what tensors need: it builds strings, numbers, tuples, lists,
    dicts and tensors, and calls nothing; returns what it builds.

    Raises:
        Unsupported: tensors do not need such a step.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def pop(start: int) -> list[Any]:
        above = stack[start:]
        del stack[start:]
        return above

    def marked() -> list[Any]:
        """Pops everything above the last mark, and the mark."""
        start = next(at for at in reversed(range(len(stack))) if stack[at] is _MARK)
        return pop(start)[1:]

    for step, argument, _ in pickletools.genops(program):
        match step.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE" | "MARK" as name:
                stack.append(_CONSTANTS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_Name(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_Name(*pop(-2)))
            case "TUPLE":
                stack.append(tuple(marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(pop(-int(name[-1]))))
            case "APPEND" | "APPENDS" as name:
                items = pop(-1) if name == "APPEND" else marked()
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS" as name:
                items = pop(-2) if name == "SETITEM" else marked()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BUILD":
                stack.pop()  # the version of a state dict
            case "REDUCE":
                function, arguments = pop(-2)
                stack.append(_result(function, arguments, path))
            case "BINPERSID":
                stack.append(_storage(stack.pop(), path))
            case name:
                raise _unknown(name, path)
    return stack.pop()


def _result(function: Any, arguments: Any, path: Path) -> Any:
    """Returns what a call of one of the functions that torch writes stands for."""
    if function == _DICT and arguments == ():
        return {}
    if function == _PARAMETER:
        return arguments[0]
    if function != _TENSOR:
        raise _unknown(".".join(function) if isinstance(function, _Name) else "a call", path)
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, _Storage) or not all(type(one) is int for one in (offset, *shape, *strides)):
        raise ValueError("a tensor is not described as torch describes one")
    return _Tensor(storage, offset, shape, strides)


def _storage(reference: Any, path: Path) -> _Storage:
    """Returns what torch's reference to raw data says, ('storage', class, record, device, number of
    elements).
    """
    _, kind, record, _, count = reference
    if kind.module != "torch" or kind.name not in _STORAGES or not isinstance(record, str):
        raise _unknown(f"{kind.module}.{kind.name}", path)
    return _Storage(record, _STORAGES[kind.name], count)


def _unknown(what: str, path: Path) -> Unsupported:
    """Returns the error for a program that asks for anything else."""
    return Unsupported(
        "the pickle asks for something else than tensors, and nothing of it was run",
        where=path,
        found=printable(what[:200]),
        expected="tensors by name, as torch.save writes a state dict",
        remedy="save the adapter again with save_pretrained where you trust it",
    )
