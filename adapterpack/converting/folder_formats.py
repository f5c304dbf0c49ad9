"""Reads and writes the formats that are folders: packs, and PEFT's two files."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from msgspec.structs import replace

from ..errors import Unsupported
from ..io.hashing import sha256_of
from ..io.safe_open import TENSORS
from ..manifest import manifest as m
from ..pack.contents import encode_files
from ..pack.from_peft import imported
from ..pack.lineage import descended
from ..pack.pack import Pack, build
from ..pack.validate.validation import load
from ..peft import layout
from ..peft.options import unknown_sentence
from .base import BaseModel, bind_to_base
from .format import Format, Reading, Source
from .peft_decomposition import from_peft, to_peft
from .peft_parameters import of_parameters

ON_BASE = ("PEFT's file means this adapter with the singular vectors that torch gives on this machine's CPU; elsewhere these, "
           "and so what the file means, may be others")


def dequantized(pack: Pack) -> tuple[Pack, tuple[str, ...]]:
    """A quantized pack with its tensors as floats, and a note about it; any other pack as it is.

    The values are those that every runtime uses: the error of the quantization remains.
    """
    stored = pack.manifest.quantization
    if stored is None:
        return pack, ()
    claims = pack.manifest
    adapters = {adapter.site: (adapter.config, adapter.params) for adapter in pack.adapters()}  # quantized packs have one method
    weights = {group.path: group.weight for group in claims.groups}
    plain = build(pack.name, pack.method, adapters, task=claims.task, base=claims.base, full=pack.full(), weights=weights,
                  problem=claims.problem,
                  lineage=descended("convert", [pack], {"dequantized": stored["scheme"]}),
                  training=claims.training, license=claims.license, extensions=claims.extensions)
    return plain, (f"the pack is quantized ({stored['scheme']}): its values are written as float32, with the error they have",)


def require_base_fits(pack: Pack, base: BaseModel | None) -> Pack:
    """The pack itself, after checking that it fits the base.

    Raises:
        BaseMismatch: it was made for another base.
        SiteNotFound: the base lacks a site.
    """
    if base is not None:
        bind_to_base(pack, base)
    return pack


def _read_pack(source: Source) -> Reading:
    return Reading(require_base_fits(load(source.path), source.base))


def _write_pack(pack: Pack, folder: Path, base: BaseModel | None) -> tuple[str, ...]:
    plain, notes = dequantized(pack)
    plain.write_into(folder)
    return notes


def _read_peft(source: Source) -> Reading:
    pack, unknown, rewritten = imported(source.path, source.name, on_base=source.base is not None, task=source.part,
                                        base=None if source.base is None else source.base.stored_shape)
    notes = (unknown_sentence(unknown),) if unknown else ()
    if source.base is None:
        return Reading(pack, notes)
    if rewritten is not None:
        return Reading(bind_to_base(from_peft(pack, source.base, rewritten.completed), source.base), (*notes, rewritten.note))
    if pack.method.peft is None or pack.method.peft.from_peft_with_base is None:
        return Reading(bind_to_base(pack, source.base), notes)
    return Reading(bind_to_base(from_peft(pack, source.base), source.base), (*notes, ON_BASE))


def _write_peft(pack: Pack, folder: Path, base: BaseModel | None) -> tuple[str, ...]:
    """The two files, byte for byte as in a pack's folder."""
    plain, notes = dequantized(pack)
    files = encode_files(plain.manifest, plain.tensors)
    if layout.CONFIG not in files and (on_base := to_peft(plain, base)) is not None:
        config = layout.config_bytes(on_base.manifest, on_base=True)
        files = {**encode_files(on_base.manifest, on_base.tensors), **({} if config is None else {layout.CONFIG: config})}
        notes += (ON_BASE,) if on_base.method.peft is not None and on_base.method.peft.from_peft_with_base is not None else ()
    if layout.CONFIG not in files and (parameters := of_parameters(plain, base)) is not None:
        files, notes = parameters[0], notes + parameters[1]
    if layout.CONFIG not in files:
        kinds = dict.fromkeys(group.kind for group in pack.manifest.groups if group.role == "adapter")
        raise Unsupported("PEFT has no such method, or another form of it at a kind of layer", where=f"pack '{pack.name}'",
                          found=f"{', '.join(method.name for method in pack.methods)} at {', '.join(kinds)}",
                          remedy="keep the pack as it is")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if pack.manifest.task.labels:
        notes += (f"PEFT's files have no place for label names: {len(pack.manifest.task.labels)} are left out",)
    return notes


def source_digest(path: Path) -> tuple[str, str]:
    """Digest and name of the file with an adapter's numbers: the file itself, or PEFT's tensor file in a folder."""
    file = path / TENSORS if path.is_dir() else path
    return f"sha256:{sha256_of(file)}", path.resolve().name


def with_parent(pack: Pack, form: str, parent: tuple[str, str]) -> Pack:
    """The pack with the converted file recorded as its parent, by digest."""
    digest, name = parent
    shown = "".join(c if c.isprintable() else "_" for c in name)[:512] or "source"
    lineage = m.Lineage("convert", (m.Parent(digest, shown),), {"from": form})
    return dataclasses.replace(pack, manifest=replace(pack.manifest, lineage=lineage))


PACK = Format("pack", "a pack: manifest and tensors", True, lambda path: os.path.lexists(path / m.FILE_NAME), _read_pack, _write_pack,
              _read_pack)
PEFT = Format("peft", "PEFT's adapter_config.json and adapter_model.safetensors", True,
              lambda path: (path / layout.CONFIG).is_file(), _read_peft, _write_peft, _read_peft, parts=True)
