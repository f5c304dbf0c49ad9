"""Reads and writes PEFT's folders: a config and a tensors file."""

from __future__ import annotations

from pathlib import Path

from ...adapter_methods import OfBase
from ...errors import Unsupported
from ...pack import Pack
from ...pack.files import encode_files
from ...pack.from_peft import import_folder
from ...peft import layout, unknown_sentence
from .. import (
    FORMATS,
    BaseModel,
    ConversionSource,
    Format,
    Notes,
    Reading,
    bind_to_base,
    dequantize,
    tensors_of,
)
from ..peft_decomposition import from_peft, to_peft
from ..peft_parameters import of_parameters, reorder_for_peft
from ..tinker import split_experts

ON_BASE = (
    "PEFT's file means this adapter with the singular vectors that torch gives on this machine's CPU; "
    "elsewhere these, and so what the file means, may be others"
)

_VALUE_HEADS = ("pytorch_model.bin", "value_head.bin", "value_head.safetensors")
"""Files in which TRL and LLaMA-Factory store the value head of a model trained with PPO."""


def _read(source: ConversionSource) -> Reading:
    tensors, said = tensors_of(source.path, source)
    if tensors is None and (split := split_experts(source.path)) is not None:
        tensors = split
        said = ("the experts of Tinker's service were split into the matrices of each",)
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
    if source.base is not None and (base_change is not None or _depends_on_base(pack)):
        pack = from_peft(pack, source.base, None if base_change is None else base_change.completed)
        notes += (ON_BASE if base_change is None else base_change.note,)
    return Reading(bind_to_base(pack, source.base), notes)


def write(pack: Pack, folder: Path, base: BaseModel | None) -> Notes:
    """Writes the two files, byte for byte as in a pack's folder."""
    plain, notes = dequantize(pack)
    files, more = _files(plain, base)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    notes += more
    if labels := pack.manifest.task.labels:
        notes += (f"PEFT's files have no place for label names: {len(labels)} are left out",)
    return notes


def _files(pack: Pack, base: BaseModel | None) -> tuple[dict[str, bytes], Notes]:
    """Returns the files in the first form that PEFT has for the pack, and notes on them.

    Raises:
        Unsupported: PEFT has none.
    """
    files = encode_files(pack.manifest, pack.tensors)
    if layout.CONFIG in files:
        return files, ()
    on_base = to_peft(pack, base)
    config = None if on_base is None else layout.config_bytes(on_base.manifest, on_base=True)
    if on_base is not None and config is not None:
        files = {**encode_files(on_base.manifest, on_base.tensors), layout.CONFIG: config}
        return files, (ON_BASE,) if _depends_on_base(on_base) else ()
    if (parameters := of_parameters(pack, base)) is not None:
        return parameters
    if (in_order := reorder_for_peft(pack)) is not None:
        return in_order, ()
    kinds = dict.fromkeys(group.kind for group in pack.manifest.adapter_groups)
    raise Unsupported(
        "PEFT has no such method, or another form of it at a kind of layer",
        where=pack.where,
        found=f"{', '.join(method.name for method in pack.methods)} at {', '.join(kinds)}",
        remedy="keep the pack as it is",
    )


def _depends_on_base(pack: Pack) -> bool:
    """Whether what PEFT's file means depends on a decomposition of the base's weights."""
    return pack.method.peft is not None and "from_peft_with_base" in pack.method.peft.overrides


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
