"""The interface of an adapter format: detect, read and write. What a format cannot store is an error, what it
changes is a note.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError, FormatError, Unsupported, printable
from ..io.safe_open import TENSORS, open_regular, read_at_most
from ..pack.pack import Pack
from ..registry import Registry
from .base import BaseModel

MAX_FILE = 16 << 30
"""Bytes of a file that is read whole."""


class ConversionSource(NamedTuple):
    """What is read: a path, the name for the pack, the base (if named), and the model or task to choose from
    a file with several.

    ``converted``: it is to become something else, so that tensors are taken out of a pickle, too; who only
    looks refuses it.
    """

    path: Path
    name: str
    base: BaseModel | None = None
    part: str | None = None
    converted: bool = False


class Reading(NamedTuple):
    """The result of reading: a pack, and notes on how the file was interpreted."""

    pack: Pack
    notes: tuple[str, ...] = ()


class Format(NamedTuple):
    """A format: ``detect`` looks at names and first bytes only; ``read`` validates like a pack; ``write``
    returns notes.

    ``folder`` says that it is a folder, not a file; ``write`` gets an empty folder or a free path, and is
    None where a format is only read. ``read_without_base`` reads an adapter for inspection; modules keep the
    names that they have in the file. Detection asks the formats in the order of their ``rank``. ``parts``:
    one file may hold adapters of several models. ``tensors`` is the file of a folder that holds the numbers.
    ``suffix`` is how the name of its file ends,
    where it is one.
    """

    name: str
    summary: str
    folder: bool
    detect: Callable[[Path], bool]
    read: Callable[[ConversionSource], Reading]
    write: Callable[[Pack, Path, BaseModel | None], tuple[str, ...]] | None
    read_without_base: Callable[[ConversionSource], Reading]
    rank: int = 50
    parts: bool = False
    tensors: str = TENSORS
    suffix: str = ""


FORMATS: Registry[Format] = Registry(
    "adapter format", Format, "adapterpack.formats", "adapterpack.converting.formats"
)
"""Name -> format; every file of ``formats/`` registers its own."""


def formats() -> dict[str, Format]:
    """Every format by name, in the order in which detection asks them.

    Example:
        >>> list(formats())[0], formats()["gguf"].folder
        ('pack', False)
    """
    return {form.name: form for form in sorted(FORMATS.values(), key=lambda form: (form.rank, form.name))}


def first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a regular file; none of anything else."""
    if not path.is_file():
        return b""
    with open_regular(path) as file:
        return file.read(count)


def read_file(path: Path) -> bytes:
    """Reads a file once, so that exactly the checked bytes are used.

    Raises:
        FormatError: it is larger than any adapter.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE:
            raise FormatError(
                "the file is too large for an adapter",
                where=path,
                expected=f"at most {MAX_FILE} bytes",
                found=size,
            )
        return read_at_most(file, size)


def require_base(base: BaseModel | None, where: object, why: str) -> BaseModel:
    """The base, which must have been named.

    Raises:
        ConfigError: none was named.
    """
    if base is None:
        raise ConfigError(
            f"this format needs the base model: {why}",
            where=where,
            remedy="name its folder with --base (base=...)",
        )
    return base


def refuse_full_modules(pack: Pack, form: str) -> None:
    """Refuses a pack with fully trained modules, for formats that store only low-rank factors.

    Raises:
        Unsupported: names the modules.
    """
    if whole := list(pack.full()):
        raise Unsupported(
            f"the format {form} cannot carry modules that were trained whole",
            where=f"pack '{pack.name}'",
            expected="low-rank factors only",
            found=list_first(whole),
            remedy="convert to peft or onnx_adapter, or merge the pack",
        )


def list_first(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are.

    Example:
        >>> list_first(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    shown = ", ".join(printable(name[:200]) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def plain_name(text: str) -> str:
    """A text in the characters that a pack's name may have.

    Example:
        >>> plain_name("my LoRA (v2)")
        'my-LoRA-v2'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:128] or "adapter"
