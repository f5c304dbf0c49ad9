"""Converts adapters from one format to another, through a pack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, FormatError, NothingToDo, Unsupported
from ..hub import folder_of
from ..io import Json, SafetensorsFile, output_file, output_folder, refuse_existing, sha256_of
from ..manifest import plain_name
from ..pack import Pack
from ..pack.on_base import rewritten_on
from ..paths import StrPath
from .base import BaseModel, open_base
from .format import (
    FORMATS,
    ConversionSource,
    Format,
    Notes,
    first_bytes,
    format_of,
    formats,
    require_base,
)
from .labels import name_labels, unnamed_note
from .packs import require_base_fits, with_parent
from .refused import refuse_known


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion: both formats, the path, the intermediate pack, and notes."""

    source: str
    target: str
    path: Path
    pack: Pack
    notes: Notes

    def to_json(self) -> Json:
        """Returns the conversion as ``convert --json`` prints it."""
        manifest = self.pack.manifest
        files = (
            [self.path]
            if self.path.is_file()
            else sorted(file for file in self.path.rglob("*") if file.is_file())
        )
        return {
            "from": self.source,
            "to": self.target,
            "path": str(self.path),
            "name": self.pack.name,
            "id": self.pack.id,
            "sites": len(manifest.adapter_groups),
            "modules_to_save": [group.path for group in manifest.full_groups],
            "bytes": sum(file.stat().st_size for file in files),
            "notes": list(self.notes),
        }


def convert(
    source: StrPath | Pack,
    out: StrPath,
    *,
    to: str | None = None,
    base: StrPath | BaseModel | None = None,
    part: str | None = None,
    labels: Sequence[str] | None = None,
    allow_structural: bool = False,
    graph: StrPath | None = None,
) -> Conversion:
    """Converts a pack, or an adapter of another tool, to another format.

    ``to`` is one of ``pack``, ``peft``, ``xlora``, ``mlx``, ``adapterhub``, ``gguf``, ``kohya``,
    ``diffusers`` and ``onnx_adapter``; by default what the ending of ``out`` says, or ``peft`` of a pack and
    a pack of anything else. ``base`` is the model that the adapter belongs to: GGUF needs it both ways, kohya
    for reading and AdapterHub for writing, and with it a pack names its base by content. ``part`` chooses
    among the models of a kohya or diffusers file that holds adapters for several, by the prefix of its keys,
    and among the tasks of a folder of PEFT (Poly, multitask prompt tuning), which are counted from 0.
    ``labels`` names the labels of a classifier's head in a pack, in the order of its logits. A pack whose
    modules have names of another version of transformers becomes one with the names of this one, where the
    base is named. ``graph`` is the file of an ONNX graph with inputs for an adapter, which another tool may
    have made: an ``onnx_adapter`` is written with its names, ranks and dtypes.
    ``allow_structural`` accepts a base that has the names, dtypes and shapes of the pack's, whatever its
    weights.

    Raises:
        UnknownName: no such format.
        NothingToDo: the source is of that format already.
        FormatError: the source is malformed, or of no known format.
        NonFinite: it holds NaN or infinity.
        Unsupported: it holds something that the target, or a pack, cannot carry; names it.
        ConfigError: the base is needed and was not named; the ending of ``out`` is that of two formats; the
            labels do not fit the head.
        BaseMismatch: the adapter does not fit the base.
        OutputExists: ``out`` is taken.

    Example:
        >>> convert("packs/tickets", "tickets.gguf", to="gguf", base="models/base").notes  # doctest: +SKIP
        ()
    """
    target = Path(out)
    to = to or _format_for(target, source, labels)
    written = FORMATS[to]
    if labels is not None and to != "pack":
        raise Unsupported(
            f"the format {to} has no place for label names",
            where=target,
            remedy="write a pack: --to pack (to=)",
        )
    write = _writer(written, graph)
    refuse_existing(target)
    model = None if base is None else dataclasses.replace(open_base(base), allow_structural=allow_structural)
    name = plain_name(target.name if written.folder else target.stem)
    notes: Notes = ()
    if isinstance(source, Pack):
        form = FORMATS["pack"]
        pack = require_base_fits(source, model)
    else:
        path = folder_of(source)
        form = detect(path)
        source_name = plain_name(path.resolve().name if path.is_dir() else path.stem)
        if form.needs_base:
            require_base(model, path, form.needs_base)
        pack, notes = form.read(
            ConversionSource(path, name if to == "pack" else source_name, model, part, converted=True)
        )
        if form.name != "pack":
            pack = with_parent(
                pack, form.name, path.resolve().name, f"sha256:{sha256_of(form.file_of(path))}"
            )
    if part is not None and not form.parts:
        raise Unsupported(
            "a file of this format has no parts to choose from",
            found=form.name,
            remedy="leave --part out",
            expected=", ".join(name for name, one in formats().items() if one.parts),
        )
    read = pack
    if form.name == to == "pack" and model is not None:
        pack = rewritten_on(pack, model.checkpoint)
    if form.name == to and pack is read and pack.manifest.quantization is None and labels is None:
        raise NothingToDo(
            f"the source is in the format {to} already",
            where=source if not isinstance(source, Pack) else source.name,
            remedy=f"name another format with --to: {', '.join(writable())}",
        )
    if labels is not None:
        pack = name_labels(pack, labels, child=form.name == "pack")
    if to == "pack":
        pack = pack.renamed(name)
        notes += unnamed_note(pack)
    with _output(written, target) as destination:
        notes += write(pack, destination, model)
    return Conversion(form.name, to, target, pack, notes)


def _writer(form: Format, graph: StrPath | None) -> Callable[..., Notes]:
    """Returns what writes a format, for a graph if one is named.

    Raises:
        Unsupported: the format is only read, or is not made for a graph.
    """
    if form.write is None:
        raise Unsupported(
            f"the format {form.name} is only read", remedy=f"name another with --to: {', '.join(writable())}"
        )
    if graph is None:
        return form.write
    if form.write_for is None:
        raise Unsupported(
            f"the format {form.name} is not made for a graph",
            where=graph,
            remedy="write an adapter for a graph: --to onnx_adapter (to=)",
        )
    write_for = form.write_for
    return lambda pack, out, model: write_for(pack, out, Path(graph))


def _format_for(out: Path, source: StrPath | Pack, labels: Sequence[str] | None) -> str:
    """Returns the format to write if the caller names none.

    Raises:
        ConfigError: files of several formats end like ``out``.
    """
    if out.suffix and (ending := [name for name in writable() if FORMATS[name].suffix == out.suffix]):
        if len(ending) > 1:
            raise ConfigError(
                "files of several formats have this ending",
                where=out,
                found=out.suffix,
                expected="the format by its name",
                remedy=f"name it with --to (to=): {' or '.join(ending)}",
            )
        return ending[0]
    is_pack = isinstance(source, Pack) or FORMATS["pack"].detect(folder_of(source))
    return "peft" if is_pack and labels is None else "pack"


def writable() -> list[str]:
    """Returns the names of the formats that can be written."""
    return [name for name, form in formats().items() if form.write is not None]


def detect(path: Path) -> Format:
    """Detects the format of a file or folder by its names and first bytes.

    Raises:
        FormatError: it is not in a supported format.
        Unsupported: it is of a kind that is never read, such as a pickle.
    """
    if (found := format_of(path)) is not None:
        return found
    refuse_known(path)
    if path.suffix == ".safetensors" and path.is_file():
        SafetensorsFile(path)  # raises an error that explains why the file cannot be read
    raise FormatError(
        "this is not an adapter in a known format",
        where=path,
        found="a folder" if path.is_dir() else f"first bytes {first_bytes(path, 8)!r}",
        expected=", ".join(formats()),
        remedy="name the folder of a pack, of PEFT or of a base, or the adapter's file",
    )


@contextmanager
def _output(form: Format, out: Path) -> Iterator[Path]:
    """Yields a temporary folder or file for a format to write to, and renames it to ``out`` on success."""
    if form.folder:
        with output_folder(out) as folder:
            yield folder
        return
    with output_file(out) as file:
        yield file
        refuse_existing(out)
