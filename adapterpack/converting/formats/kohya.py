"""Reads and writes kohya's LoRA files: ``<model>_<module path with underscores>.lora_down.weight``,
``.lora_up.weight`` and ``.alpha``.

The change is ``alpha / r * up @ down``. Names with underscores do not show where the dots were, so reading
them needs the base's module names. The module also reads the other forms of LyCORIS
(:mod:`~..lycoris.forms`), and writes methods other than LoRA in them (:mod:`~..lycoris.writing`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...adapter_methods import Arrays, Site, Tensors, get
from ...base import in_memory, publish_path
from ...errors import SiteNotFound, Unsupported, require_among
from ...io import SafetensorsFile, safetensors
from ...manifest import MethodSites
from ...pack import Pack
from .. import (
    FORMATS,
    BaseModel,
    ConversionSource,
    Format,
    Notes,
    Reading,
    bind_to_base,
    choose_models,
    dequantize,
    foreign_pack,
    group_leaves,
    is_text_model,
    keys_of,
    list_first,
    missing_alpha_note,
    published_in,
    refuse_full_modules,
    site_factors,
)
from ..factors import require_linear
from ..lycoris.forms import FORMS, LEAVES, LycorisLayer, form_of
from ..lycoris.writing import WRITERS, number

_DOWN = "lora_down.weight"
_UP = "lora_up.weight"
_ALPHA = "alpha"
_PREFIXES = ("lora_unet", "lora_te1", "lora_te2", "lora_te3", "lora_te", "lora_transformer", "lycoris")
"""Key prefixes, each for one model of the pipeline."""
_NUMBER = re.compile(r"_(\d+)_")


def _split(key: str) -> tuple[str, str] | None:
    """Returns the module and the leaf of a key, or None for a key that is not kohya's."""
    module, _, leaf = key.partition(".")
    return (module, leaf) if _prefix(module) is not None and leaf in LEAVES else None


def _prefix(module: str) -> str | None:
    return next((prefix for prefix in _PREFIXES if module.startswith(f"{prefix}_")), None)


def flat(path: str) -> str:
    """Returns a module path in kohya's form.

    Example:
        >>> flat("down_blocks.0.attn1.to_q")
        'down_blocks_0_attn1_to_q'
    """
    return path.replace(".", "_")


def _write(pack: Pack, out: Path, base: BaseModel | None) -> Notes:
    refuse_full_modules(pack, "kohya")
    plain, notes = dequantize(pack)
    manifest = pack.manifest
    tensors: Arrays = {}
    recorded = manifest.training.get("part")
    prefix = (
        recorded
        if recorded in _PREFIXES
        else "lora_te"
        if is_text_model(base, manifest.base.model_type)
        else "lora_unet"
    )
    named = published_in(pack, base)
    for path, leaves in _leaves(plain).items():
        name = f"{prefix}_{flat(named(path))}"
        if any(f"{name}.{leaf}" in tensors for leaf in leaves):
            raise Unsupported(
                "two modules have one name when their dots become underscores",
                where=pack.where,
                found=name,
                remedy="convert to diffusers or peft",
            )
        tensors |= {f"{name}.{leaf}": value for leaf, value in leaves.items()}
    safetensors.write(out, tensors, {"ss_network_module": "networks.lora"})
    return (*notes, f"keys begin with {prefix}_") if recorded is None else notes


def _leaves(pack: Pack) -> dict[str, Arrays]:
    """Returns module path -> leaf -> tensor."""
    leaves = {
        site.path: {_DOWN: site.down, _UP: site.up, _ALPHA: number(site.alpha)}
        for site in site_factors(pack, "kohya", WRITERS)
    }
    for adapter in pack.adapters():
        if adapter.method.name in WRITERS:
            require_linear(adapter, "kohya")
            leaves[adapter.site.path] = WRITERS[adapter.method.name](adapter)
    return leaves


def _read(source: ConversionSource) -> Reading:
    """Reads the chosen model; for inspection all models, with dots only around numbers, where they are
    certain.
    """
    file = SafetensorsFile(source.path, private=True)
    modules = group_leaves(
        file.tensors,
        _split,
        source.path,
        ", ".join(FORMS),
        "merge it with the tool that made it, or convert it to plain LoRA there",
    )
    parts: dict[str, list[str]] = {}
    for module in modules:
        parts.setdefault(_prefix(module) or "", []).append(module)
    chosen, notes = choose_models(parts, source)
    if source.base is None:
        layers = {
            module: LycorisLayer(_NUMBER.sub(r".\1.", module), f"{source.path}, {module}")
            for module in modules
        }
        pack, without_alpha = _pack(file, modules, layers, source)
    else:
        (part,) = chosen
        names = {module: module.removeprefix(f"{part}_") for module in parts[part]}
        paths = _paths(source.base, set(names.values()), source)
        layers = {
            module: _layer(source.base, paths[name], f"{source.path}, {module}")
            for module, name in names.items()
        }
        pack, without_alpha = _pack(file, modules, layers, source, part=part)
    return Reading(bind_to_base(pack, source.base), notes + missing_alpha_note(without_alpha))


def _layer(base: BaseModel, path: str, where: str) -> LycorisLayer:
    """Returns a layer of the base; its numbers are read only if a form needs them."""
    weight = base.weight_name(path)
    names = {"weight": weight, "bias": f"{weight.removesuffix('weight')}bias"}
    return LycorisLayer(
        path, where, base.shapes[weight], names["bias"] in base.shapes, lambda name: base.read(names[name])
    )


def _pack(
    file: SafetensorsFile,
    modules: Mapping[str, Mapping[str, str]],
    layers: Mapping[str, LycorisLayer],
    source: ConversionSource,
    **claims: Any,
) -> tuple[Pack, list[str]]:
    """Builds the pack of these layers, each in the form that its tensors have; also returns the modules
    without a stated alpha.
    """
    sites: dict[str, dict[Site, tuple[Any, Tensors]]] = {}
    full = {}
    without_alpha = []
    for module, layer in sorted(layers.items(), key=lambda item: item[1].path):
        leaves = modules[module]
        form = form_of(leaves, layer.where)
        found = form.read({leaf: file.read(key) for leaf, key in leaves.items()}, layer)
        if form.scaled and "alpha" not in leaves:
            without_alpha.append(module)
        if found.site is None or found.method is None:
            full[layer.path] = found.params or {}
        else:
            sites.setdefault(found.method, {})[found.site] = (found.config, found.params or {})
    by_size = sorted(sites, key=lambda name: (-len(sites[name]), name))
    return foreign_pack(
        source, [MethodSites(get(name), sites[name]) for name in by_size], "kohya", full=full, **claims
    ), without_alpha


def _paths(base: BaseModel, wanted: set[str], source: ConversionSource) -> dict[str, str]:
    """Returns flat name -> module path of the base.

    Raises:
        SiteNotFound: the base has no such module.
        Unsupported: two of its modules have that name.
    """
    by_name: dict[str, list[str]] = {}
    steps = base.checkpoint.renamings
    for path in base.modules():
        here = in_memory(path, steps)
        for name in {flat(path), flat(here), flat(publish_path(here, steps))}:
            by_name.setdefault(name, []).append(path)
    for name in sorted(wanted):
        missing = "the base has no module of this name"
        require_among(missing, name, by_name, SiteNotFound, source.path, found=name)
        if len(by_name[name]) > 1:
            raise Unsupported(
                "the name fits several modules of the base",
                where=source.path,
                expected="one",
                found=list_first(by_name[name]),
                remedy="use the adapter in the form of diffusers or PEFT, which keep the dots",
            )
    return {name: by_name[name][0] for name in wanted}


KOHYA = FORMATS.register(
    Format(
        "kohya",
        "kohya's keys (lora_unet_..., lora_te_...) in safetensors, one file",
        False,
        lambda path: any(_prefix(key) for key in keys_of(path)),
        _read,
        _write,
        "names with underscores do not say where the dots of a module's path are",
        rank=30,
        parts=True,
        suffix=".safetensors",
    )
)
