"""Reads and writes PEFT's folders: a config and a tensors file."""

from __future__ import annotations

from pathlib import Path

from ...adapter_methods.core.peft_form import OfBase
from ...errors import Unsupported
from ...pack.files import encode_files
from ...pack.from_peft import import_folder
from ...pack.pack import Pack
from ...peft import layout
from ...peft.options import unknown_sentence
from ..base import BaseModel, bind_to_base
from ..format import FORMATS, ConversionSource, Format, Reading
from ..packs import dequantize
from ..peft_decomposition import from_peft, to_peft
from ..peft_parameters import of_parameters, reorder_for_peft
from ..tensor_files import tensors_of

ON_BASE = (
    "PEFT's file means this adapter with the singular vectors that torch gives on this machine's CPU; "
    "elsewhere these, and so what the file means, may be others"
)

_VALUE_HEADS = ("pytorch_model.bin", "value_head.bin", "value_head.safetensors")
"""Files in which TRL and LLaMA-Factory store the value head of a model trained with PPO."""


def _read(source: ConversionSource) -> Reading:
    tensors, said = tensors_of(source.path, source)
    pack, unknown, base_change = import_folder(
        source.path,
        source.name,
        on_base=source.base is not None,
        tensors=tensors,
        task=source.part,
        base=None if source.base is None else OfBase(source.base.stored_shape, source.base.module_paths),
    )
    notes = said + ((unknown_sentence(unknown),) if unknown else ())
    notes += tuple(
        f"{name} is not carried: a value head is for training alone"
        for name in _VALUE_HEADS
        if (source.path / name).is_file()
    )
    if source.base is None:
        return Reading(pack, notes)
    if base_change is not None:
        return Reading(
            bind_to_base(from_peft(pack, source.base, base_change.completed), source.base),
            (*notes, base_change.note),
        )
    if pack.method.peft is None or "from_peft_with_base" not in pack.method.peft.overrides:
        return Reading(bind_to_base(pack, source.base), notes)
    return Reading(bind_to_base(from_peft(pack, source.base), source.base), (*notes, ON_BASE))


def write(pack: Pack, folder: Path, base: BaseModel | None) -> tuple[str, ...]:
    """Writes the two files, byte for byte as in a pack's folder."""
    plain, notes = dequantize(pack)
    files = encode_files(plain.manifest, plain.tensors)
    if layout.CONFIG not in files and (on_base := to_peft(plain, base)) is not None:
        config = layout.config_bytes(on_base.manifest, on_base=True)
        files = {
            **encode_files(on_base.manifest, on_base.tensors),
            **({} if config is None else {layout.CONFIG: config}),
        }
        notes += (
            (ON_BASE,)
            if on_base.method.peft is not None and "from_peft_with_base" in on_base.method.peft.overrides
            else ()
        )
    if layout.CONFIG not in files and (parameters := of_parameters(plain, base)) is not None:
        files, notes = parameters[0], notes + parameters[1]
    if layout.CONFIG not in files and (in_order := reorder_for_peft(plain)) is not None:
        files = in_order
    if layout.CONFIG not in files:
        kinds = dict.fromkeys(group.kind for group in pack.manifest.adapter_groups)
        raise Unsupported(
            "PEFT has no such method, or another form of it at a kind of layer",
            where=pack.where,
            found=f"{', '.join(method.name for method in pack.methods)} at {', '.join(kinds)}",
            remedy="keep the pack as it is",
        )
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if pack.manifest.task.labels:
        notes += (
            f"PEFT's files have no place for label names: {len(pack.manifest.task.labels)} are left out",
        )
    return notes


PEFT = FORMATS.register(
    Format(
        "peft",
        "PEFT's adapter_config.json and adapter_model.safetensors",
        True,
        lambda path: (path / layout.CONFIG).is_file(),
        _read,
        write,
        rank=90,
        parts=True,
    )
)
