"""Defines an adapter format: detect, read and write. Content that a format cannot store is an error, content
that it alters is a note.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError, FormatError, Unsupported, printable
from ..io import TENSORS, open_regular, read_at_most
from ..pack import Pack
from ..peft import CONFIG, PICKLES, SHARD, TORCHTUNE
from ..registry import Registry
from .base import BaseModel

MAX_FILE = 16 << 30
"""The largest file, in bytes, that is read into memory."""
Notes = tuple[str, ...]
"""What a user should know of a conversion, in sentences."""


class ConversionSource(NamedTuple):
    """The input of a conversion: a path, the name for the pack, the base (if named), and the model or task to
    choose from a file with several.

    ``converted``: the caller converts the adapter, which allows reading tensors from a pickle; inspection
    refuses pickles. Without a base and a conversion, all of the file is read under the names that it has.
    """

    path: Path
    name: str
    base: BaseModel | None = None
    part: str | None = None
    converted: bool = False

    @property
    def inspected(self) -> bool:
        """Whether the file is read by itself, to look at it."""
        return self.base is None and not self.converted


class Reading(NamedTuple):
    """The result of reading: a pack, and notes on how the file was interpreted."""

    pack: Pack
    notes: Notes = ()


class Format(NamedTuple):
    """A format: ``detect`` looks at names and first bytes only; ``read`` validates like a pack; ``write``
    returns notes.

    ``folder`` says that it is a folder, not a file; ``write`` gets an empty folder or a free path, and is
    None for a format that is only read. ``needs_base`` says why a conversion from it needs the base; without
    one ``read`` keeps the names that modules have in the file. Detection tries the formats in the order of
    their ``rank``. ``parts``: one file may hold adapters of several models. ``tensors`` are the names of
    the file with the tensors in a folder, today's first. ``suffix`` is the ending of the file's name, for
    formats of one file. ``write_for`` writes it for a graph, the path of whose file takes the place of the
    base.
    """

    name: str
    summary: str
    folder: bool
    detect: Callable[[Path], bool]
    read: Callable[[ConversionSource], Reading]
    write: Callable[[Pack, Path, BaseModel | None], Notes] | None
    needs_base: str = ""
    rank: int = 50
    parts: bool = False
    tensors: tuple[str, ...] = (TENSORS, *PICKLES)
    suffix: str = ""
    write_for: Callable[[Pack, Path, Path], Notes] | None = None

    def file_of(self, path: Path) -> Path:
        """Returns the file with the tensors of an adapter: the first of several shards."""
        if not self.folder:
            return path
        counted = (
            one
            for one in sorted(path.iterdir())
            if SHARD.fullmatch(one.name) or TORCHTUNE.fullmatch(one.name)
        )
        named = (path / name for name in self.tensors)
        return next((file for file in (*named, *counted) if file.exists()), path / self.tensors[0])


FORMATS: Registry[Format] = Registry(
    "adapter format", Format, "adapterpack.formats", "adapterpack.converting.formats"
)
"""Name -> format; every module of ``formats/`` registers its own."""


def formats() -> dict[str, Format]:
    """Returns every format by name, in the order in which detection tries them.

    Example:
        >>> list(formats())[0], formats()["gguf"].folder
        ('pack', False)
    """
    return {form.name: form for form in sorted(FORMATS.values(), key=lambda form: (form.rank, form.name))}


def format_of(path: Path) -> Format | None:
    """Returns the format of a file or folder, by its names and first bytes; None if it is in none."""
    return next((form for form in formats().values() if form.detect(path)), None)


def beside_config(*files: str) -> Callable[[Path], bool]:
    """Returns what recognizes a folder with ``adapter_config.json`` and one of these files, without tensors
    under PEFT's name.
    """
    return lambda path: (
        (path / CONFIG).is_file()
        and not (path / TENSORS).exists()
        and any((path / name).is_file() for name in files)
    )


def first_bytes(path: Path, count: int) -> bytes:
    """Returns the first bytes of a regular file, and no bytes for anything else."""
    if not path.is_file():
        return b""
    with open_regular(path) as file:
        return file.read(count)


def read_file(path: Path) -> bytes:
    """Reads a file once, so that the bytes that are used are the checked ones.

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
    """Returns the base, which the caller must have named.

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
            where=pack.where,
            expected="low-rank factors only",
            found=list_first(whole),
            remedy="convert to peft or onnx_adapter, or merge the pack",
        )


def list_first(names: list[str], most: int = 5) -> str:
    """Joins the first names, and states how many more there are.

    Example:
        >>> list_first(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    shown = ", ".join(printable(name[:200]) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
