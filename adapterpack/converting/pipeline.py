"""Converts adapters from one format to another, by way of a pack."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError, NothingToDo, UnknownName, Unsupported, nearest
from ..hub.resolve import folder_of
from ..io.atomic import output_file, output_folder, refuse_existing
from ..io.safetensors import SafetensorsFile
from ..pack.pack import Pack
from .base import BaseModel, open_base
from .folder_formats import require_base_fits, source_digest, with_parent
from .format import Format, Source, first_bytes, plain_name
from .registry import formats


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion: both formats, the path, the intermediate pack, and notes."""

    source: str
    target: str
    path: Path
    pack: Pack
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The conversion as ``convert --json`` prints it."""
        groups = self.pack.manifest.groups
        files = [self.path] if self.path.is_file() else sorted(self.path.iterdir())
        return {
            "from": self.source,
            "to": self.target,
            "path": str(self.path),
            "name": self.pack.name,
            "id": self.pack.id,
            "sites": sum(group.role == "adapter" for group in groups),
            "modules_to_save": [group.path for group in groups if group.role == "full"],
            "bytes": sum(file.stat().st_size for file in files),
            "notes": list(self.notes),
        }


def convert(
    source: str | os.PathLike[str] | Pack,
    out: str | os.PathLike[str],
    *,
    to: str,
    base: str | os.PathLike[str] | BaseModel | None = None,
    part: str | None = None,
    allow_structural: bool = False,
) -> Conversion:
    """Writes a pack or an adapter of another tool in the format ``to``, whole or not at all; what cannot be carried is refused by name.

    ``to`` is one of ``pack``, ``peft``, ``gguf``, ``kohya``, ``diffusers`` and ``onnx_adapter``. ``base`` is the model that the adapter
    belongs to: GGUF needs it both ways and kohya for reading, and with it a pack names its base by content. ``part`` chooses among the
    models of a kohya or diffusers file that holds adapters for several, by the prefix of its keys, and among the tasks of a folder of PEFT
    (Poly, multitask prompt tuning), which are counted from 0. ``allow_structural`` accepts a base that
    has the names, dtypes and shapes of the pack's, whatever its weights.

    Raises:
        UnknownName: no such format.
        NothingToDo: the source is of that format already.
        FormatError: the source is malformed, or of no known format.
        NonFinite: it holds NaN or infinity.
        Unsupported: it holds something that the target, or a pack, cannot carry; names it.
        ConfigError: the base is needed and was not named.
        BaseMismatch: the adapter does not fit the base.
        OutputExists: ``out`` is taken.

    Example:
        >>> convert("packs/tickets", "tickets.gguf", to="gguf", base="models/base").notes  # doctest: +SKIP
        ()
    """
    supported, target = formats(), Path(out)
    if to not in supported:
        raise UnknownName("unknown format", found=repr(to), remedy=nearest(to, supported))
    refuse_existing(target)
    model = None if base is None else dataclasses.replace(open_base(base), allow_structural=allow_structural)
    name = plain_name(target.name if supported[to].folder else target.stem)
    notes: tuple[str, ...] = ()
    if isinstance(source, Pack):
        form, pack = supported["pack"], require_base_fits(source, model)
    else:
        path = folder_of(source)
        form = detect(path)
        source_name = plain_name(path.resolve().name if path.is_dir() else path.stem)
        pack, notes = form.read(Source(path, name if to == "pack" else source_name, model, part))
        if form.name != "pack":
            pack = with_parent(pack, form.name, source_digest(path))
    if part is not None and not form.parts:
        raise Unsupported("a file of this format has no parts to choose from", found=form.name, remedy="leave --part out",
                          expected=", ".join(name for name, one in supported.items() if one.parts))
    if form.name == to and pack.manifest.quantization is None:
        raise NothingToDo(f"the source is in the format {to} already", where=source if not isinstance(source, Pack) else source.name,
                          remedy="name another format with --to: " + ", ".join(supported))
    if to == "pack":
        pack = pack.renamed(name)
    with _output(supported[to], target) as destination:
        notes += supported[to].write(pack, destination, model)
    return Conversion(form.name, to, target, pack, notes)


def detect(path: Path) -> Format:
    """Detects the format of a file or folder by its names and first bytes.

    Raises:
        FormatError: no supported format.
        Unsupported: a pickle, which is never opened.
    """
    for form in formats().values():
        if form.detect(path):
            return form
    if first_bytes(path, 2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise Unsupported("the file is a pickle or an archive, which is never opened", where=path,
                          expected="safetensors, GGUF or .onnx_adapter",
                          remedy="save it as safetensors with the tool that wrote it, where you trust it")
    if path.suffix == ".safetensors" and path.is_file():
        SafetensorsFile(path)  # says what is wrong with a file that cannot be read
    raise FormatError("this is no adapter in a known format", where=path, found=f"first bytes {first_bytes(path, 8)!r}",
                      expected="; ".join(f"{form.name}: {form.summary}" for form in formats().values()),
                      remedy="name the folder of a pack or of PEFT, or the adapter's file")


@contextmanager
def _output(form: Format, out: Path) -> Iterator[Path]:
    """A temporary folder or file for a format to write to; it is renamed to ``out`` on success."""
    if form.folder:
        with output_folder(out) as folder:
            yield folder
        return
    with output_file(out) as file:
        yield file
        refuse_existing(out)


