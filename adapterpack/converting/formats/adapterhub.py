"""Reads and writes folders of AdapterHub's library: ``adapter_config.json``, ``adapter.safetensors``, and
(reading only) a head, or what the library saved as pickles.

Tensors have the names ``<place>.adapters.<name>.<part>`` or ``<place>.loras.<name>.<part>``; parameters that
all places share have ``<model>.shared_parameters.<name>.<part>``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...adapter_methods import Arrays
from ...errors import FormatError, Unsupported, excerpt
from ...io import SafetensorsFile, safetensors, strict_json
from ...pack import Pack
from ...peft import layout, read_config
from ...peft.options import PICKLED
from .. import (
    FORMATS,
    BaseModel,
    ConversionSource,
    Format,
    Notes,
    Reading,
    beside_config,
    bind_to_base,
    dequantize,
    foreign_pack,
    refuse_full_modules,
    require_base,
)
from ..adapterhub import bottlenecks, heads, low_rank
from ..adapterhub.families import family_of
from ..adapterhub.settings import setting
from ..adapterhub.writing import to_settings
from ..tensor_files import out_of_pickle

_FILE, _PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
_HEAD = "head_config.json"
_HEAD_FILE = "model_head.safetensors"
_HEAD_PICKLE = "pytorch_model_head.bin"
_SHARED = "shared_parameters"
_KINDS = {"adapters": (None,), "loras": ("lora",), _SHARED: (None, "lora")}
"""The part before the adapter's name in a key -> the ``architecture`` of its config."""
_VERSION = "adapters.1.3.0"
_NO_HEAD = "convert a copy of the folder without the files of the head"


def _read(source: ConversionSource) -> Reading:
    where = source.path / layout.CONFIG
    saved = read_config(where)
    config, name = (setting(saved, key, kind, str(where)) for key, kind in (("config", dict), ("name", str)))
    architecture = config.get("architecture")
    if architecture not in (None, "lora"):
        raise Unsupported(
            "this kind of AdapterHub's adapters is not read",
            where=f"{where}#/config/architecture",
            expected="bottlenecks, Compacter, LoRA, (IA)^3",
            found=excerpt(architecture),
            remedy=_remedy(architecture),
        )
    family = family_of(saved.get("model_type"), f"{where}#/model_type")
    file, notes = _open(source, _FILE, _PICKLE)
    places, shared = _sort(file, name, architecture)
    if not places:
        raise FormatError(
            "the file holds no adapter of that name", where=source.path / _FILE, found=excerpt(name)
        )
    head = _head(source)
    if head is None:
        places = _named_as_in(source.base, places)
    if architecture is None:
        sites, rules = bottlenecks.read(config, places, shared, family, str(where))
    elif shared:
        raise Unsupported(
            "LoRAs whose factors lie elsewhere",
            where=source.path / _FILE,
            found=", ".join(sorted(shared))[:80],
            remedy="merge it with the library that made it",
        )
    else:
        sites = low_rank.read(_as_trained(config, saved.get("version")), places, family, str(where))
        rules = {}
    pack = foreign_pack(
        source, [sites], "adapterhub", shared=rules, full=head and head.modules, task=head and head.task
    )
    return Reading(bind_to_base(pack, source.base), notes)


_SCALED = re.compile(r"adapters\.(\d{1,4})\.(\d{1,4})\b")
"""Matches the library's version in a folder. Versions before 1.1 ignored LoRA's alpha."""


def _as_trained(config: dict[str, Any], version: object) -> dict[str, Any]:
    """Returns the settings with the alpha that a LoRA was trained with: before 1.1 the library did not divide
    alpha by the rank, and it reads such a folder as if alpha were the rank.
    """
    stated = _SCALED.match(version) if isinstance(version, str) else None
    old = stated is not None and (int(stated[1]), int(stated[2])) < (1, 1)
    return {**config, "alpha": config.get("r")} if old else config


def _head(source: ConversionSource) -> heads.WholeHead | None:
    """Returns the head in the folder, if there is one."""
    if not (source.path / _HEAD).is_file():
        return None
    file, _ = _open(source, _HEAD_FILE, _HEAD_PICKLE)
    return heads.read(
        read_config(source.path / _HEAD),
        {key: file.read(key) for key in file.tensors},
        str(source.path / _HEAD),
    )


def _named_as_in(base: BaseModel | None, places: dict[str, Arrays]) -> dict[str, Arrays]:
    """Removes the name of the enclosing model from the places if the base is the inner model itself: the
    library always wraps a model.
    """
    outer = {place.partition(".")[0] for place in places}
    if base is None or len(outer) != 1 or any(name.partition(".")[0] in outer for name in base.shapes):
        return places
    return {place.partition(".")[2]: tensors for place, tensors in places.items()}


def _remedy(architecture: object) -> str:
    if architecture == "prefix_tuning":
        return (
            "its prefix does not move the positions of the tokens behind it, and one here does: train it "
            "here, or with PEFT"
        )
    return "save the adapters of a union one by one, or keep it with the library that made it"


def _open(source: ConversionSource, name: str, pickle: str) -> tuple[SafetensorsFile, Notes]:
    """Opens the tensors of a folder, which a conversion takes out of a pickle, too, and returns a note on
    that.
    """
    pickled = source.path / pickle
    if (source.path / name).is_file():
        return SafetensorsFile(source.path / name, private=True), ()
    if not pickled.is_file():
        raise FormatError("there are no tensors of the head", where=source.path / name, remedy=_NO_HEAD)
    if not source.converted:
        raise Unsupported(
            "the adapter is stored as a pickle, which can run code and is not opened here",
            where=pickled,
            expected=name,
            remedy=PICKLED,
        )
    return out_of_pickle(pickled)


def _sort(file: SafetensorsFile, name: str, architecture: Any) -> tuple[dict[str, Arrays], Arrays]:
    """Groups the tensors by place and part, and returns separately those that all places share."""
    places: dict[str, Arrays] = {}
    shared: Arrays = {}
    for key in file.tensors:
        kind, place, part = _split(key, name)
        if kind is None or architecture not in _KINDS[kind]:
            raise Unsupported(
                "a tensor that belongs to no adapter of this name and kind",
                where=file.path,
                found=key,
                expected=", ".join(f"...{kind}.{name[:80]}..." for kind in _KINDS),
                remedy="save that adapter alone, without invertible adapters, gates or fusions",
            )
        parts = shared if kind == _SHARED else places.setdefault(place, {})
        if part in parts:
            raise FormatError("two tensors for one place", where=file.path, found=key)
        parts[part] = file.read(key)
    return places, shared


def _split(key: str, name: str) -> tuple[str | None, str, str]:
    """Returns (kind, place, part) of a key; the kind is None if the key belongs to no adapter of that
    name.
    """
    for kind in _KINDS:
        place, found, part = f".{key}".partition(f".{kind}.{name}.")
        if found and part and (place or kind == _SHARED):
            return kind, place[1:], part
    return None, "", ""


def _write(pack: Pack, folder: Path, base: BaseModel | None) -> Notes:
    base = require_base(
        base, pack.where, "the settings name the kind of model, and the layers that have no adapter"
    )
    refuse_full_modules(pack, "adapterhub")
    family = family_of(base.model_type, base.folder / "config.json")
    plain, notes = dequantize(pack)
    layers, width = (
        next((base.config[key] for key in keys if type(base.config.get(key)) is int), 0)
        for keys in (("num_hidden_layers", "n_layer"), ("hidden_size", "n_embd"))
    )
    found = to_settings(plain, family, layers)
    name = pack.name.replace(".", "-")
    outer = {
        place: place if place.startswith(f"{family.outer}.") else f"{family.outer}.{place}"
        for place, _ in found.tensors
    }
    safetensors.write(
        folder / _FILE,
        {f"{outer[place]}.{name}.{part}": value for (place, part), value in found.tensors.items()},
    )
    saved = {
        "config": found.config,
        "hidden_size": width,
        "model_class": base.task().architecture,
        "model_name": "",
        "model_type": base.model_type,
        "name": name,
        "version": _VERSION,
    }
    (folder / layout.CONFIG).write_bytes(strict_json.canonical(saved))
    return notes + found.notes


ADAPTERHUB = FORMATS.register(
    Format(
        "adapterhub",
        "AdapterHub's adapter_config.json and adapter.safetensors",
        True,
        beside_config(_FILE, _PICKLE),
        _read,
        _write,
        rank=20,
        tensors=(_FILE, _PICKLE),
    )
)
