"""Reads and writes diffusers' LoRA files: ``<model>.<module path>.lora_A.weight`` and ``.lora_B.weight``,
with PEFT's config as metadata.

The metadata's ``lora_adapter_metadata`` is JSON whose keys are ``<model>.<PEFT key>``. Without it the reader
uses each module's ``.alpha``; without that, alpha is r. Keys of before diffusers 0.22 are read, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...adapter_methods import Arrays, LoRA, method_of
from ...errors import FormatError, Unsupported
from ...io import SafetensorsFile, safetensors, strict_json
from ...pack import Pack
from .. import (
    FORMATS,
    BaseModel,
    ConversionSource,
    Format,
    Notes,
    Reading,
    SiteFactors,
    bind_to_base,
    choose_models,
    dequantize,
    group_leaves,
    is_text_model,
    keys_of,
    lora_pack,
    missing_alpha_note,
    published_in,
    refuse_full_modules,
    require_pairs,
    site_factors,
    split_key,
    tensor_number,
)

_A = "lora_A.weight"
_B = "lora_B.weight"
_ALPHA = "alpha"
_OLDER = (
    (".processor.", "."),
    *((f".self_attn.to_{name}_lora.", f".self_attn.{name}_proj.lora.") for name in ("q", "k", "v", "out")),
    *((f".to_{name}_lora.", f".to_{name}.lora.") for name in ("q", "k", "v")),
    (".to_out_lora.", ".to_out.0.lora."),
    (".lora_linear_layer.", ".lora."),
    (".lora.down.", ".lora_A."),
    (".lora.up.", ".lora_B."),
)
"""What keys had before diffusers 0.22 -> what they have now, in this order."""
_METADATA = "lora_adapter_metadata"
_PARTS = (
    "base_model.model",
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "diffusion_model",
)
"""Key prefixes, each for one model of the pipeline; a key without any belongs to the model itself."""
_ITSELF = "model"
_CHANGES = ("use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "layer_replication", "target_parameters")
"""PEFT's options that change the mathematics of a plain LoRA."""


def _of_today(key: str) -> str:
    """Returns a key as diffusers writes it now.

    Example:
        >>> _of_today("unet.mid_block.attn1.processor.to_out_lora.down.weight")
        'unet.mid_block.attn1.to_out.0.lora_A.weight'
    """
    if key.endswith((".down.weight", ".up.weight")):
        for old, new in _OLDER:
            key = key.replace(old, new)
    return key


def _write(pack: Pack, out: Path, base: BaseModel | None) -> Notes:
    refuse_full_modules(pack, "diffusers")
    plain, notes = dequantize(pack)
    recorded = pack.manifest.training.get("part")
    part = recorded if recorded in (*_PARTS, _ITSELF) else _part(plain, base)
    prefix = "" if part == _ITSELF else f"{part}."
    tensors: Arrays = {}
    configs = {}
    named = published_in(pack, base)
    for site in site_factors(plain, "diffusers"):
        path = named(site.path)
        tensors |= {f"{prefix}{path}.{_A}": site.down, f"{prefix}{path}.{_B}": site.up}
        configs[path] = LoRA(r=site.down.shape[0], alpha=site.alpha)
    peft_form = method_of(LoRA()).peft
    assert peft_form is not None
    config = {**(peft_form.to_config(configs) or {}), "target_modules": sorted(configs)}
    metadata = {f"{prefix}{key}": value for key, value in config.items()}
    safetensors.write(
        out, tensors, {"format": "pt", _METADATA: json.dumps(metadata, indent=2, sort_keys=True)}
    )
    return notes if recorded is not None else (*notes, f"keys begin with {prefix or 'the module itself'}")


def _part(pack: Pack, base: BaseModel | None) -> str:
    if is_text_model(base, pack.manifest.base.model_type):
        return "text_encoder"
    blocks = ("down_blocks.", "mid_block.", "up_blocks.")
    return "unet" if any(group.path.startswith(blocks) for group in pack.manifest.groups) else "transformer"


_Sites = dict[str, SiteFactors | tuple[LoRA, np.ndarray, np.ndarray]]


def _read(source: ConversionSource) -> Reading:
    """Reads the chosen model; for inspection all models: the name of the model then precedes each module
    path.
    """
    file = SafetensorsFile(source.path, private=True)
    parts = _parts(file, source)
    chosen, notes = choose_models(parts, source)
    sites: _Sites = {}
    without_alpha = []
    for part in chosen:
        of_part, missing = _sites(file, parts[part], part, source)
        sites |= {f"{part}.{path}" if len(chosen) > 1 else path: value for path, value in of_part.items()}
        without_alpha += missing
    claims: dict[str, Any] = {} if source.inspected else {"part": chosen[0]}
    pack = lora_pack(source, sites, "diffusers", **claims)
    return Reading(bind_to_base(pack, source.base), notes + missing_alpha_note(without_alpha))


def _parts(file: SafetensorsFile, source: ConversionSource) -> dict[str, dict[str, dict[str, str]]]:
    """Returns part -> module path -> leaf -> key."""
    modules = group_leaves(
        file.tensors,
        lambda key: split_key(_of_today(key), (_A, _B, _ALPHA)),
        source.path,
        f"{_A}, {_B}, {_ALPHA}",
        "convert the adapter to plain LoRA with the tool that made it (DoRA, biases and norms are not read)",
    )
    parts: dict[str, dict[str, dict[str, str]]] = {}
    for module, leaves in modules.items():
        part = next((part for part in _PARTS if module.startswith(f"{part}.")), _ITSELF)
        path = module if part == _ITSELF else module.removeprefix(f"{part}.")
        parts.setdefault(part, {})[path] = leaves
    return parts


def _sites(
    file: SafetensorsFile, modules: Mapping[str, Mapping[str, str]], part: str, source: ConversionSource
) -> tuple[_Sites, list[str]]:
    """Returns the sites of one model by module path, and the modules without a stated alpha."""
    require_pairs(modules, (_A, _B), source.path)
    sites: _Sites = {}
    stated = _stated_config(file.metadata, part, source)
    without_alpha = []
    for path, leaves in modules.items():
        down, up = file.read(leaves[_A]), file.read(leaves[_B])
        if down.ndim != 2 or up.ndim != 2:
            raise Unsupported(
                "an adapter of a layer that is not linear",
                where=f"{source.path}, {path}",
                expected="two matrices",
                found=f"{list(down.shape)}, {list(up.shape)}",
                remedy="leave convolutions out of the adapter",
            )
        if _ALPHA in leaves:
            alpha = tensor_number(file.read(leaves[_ALPHA]), f"{source.path}, {leaves[_ALPHA]}")
            sites[path] = SiteFactors(path, down, up, alpha / max(1, down.shape[0]))
        elif stated is not None:
            sites[path] = (stated.at(path), down, up)
        else:
            without_alpha.append(path)
            sites[path] = SiteFactors(path, down, up, 1.0)
    return sites, without_alpha


def _stated_config(metadata: Mapping[str, str], part: str, source: ConversionSource) -> LoRA | None:
    """Returns the configuration that the metadata states for one model, or None.

    Raises:
        FormatError: it is not usable.
        Unsupported: it names an option that changes the mathematics.
    """
    if _METADATA not in metadata:
        return None
    where = f"{source.path}, {_METADATA}"
    values = strict_json.loads(metadata[_METADATA].encode(), where, 4 << 20)
    if not isinstance(values, dict):
        raise FormatError("the metadata must be an object", where=where)
    prefix = "" if part == _ITSELF else f"{part}."
    config = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    if not config:
        return None
    if changed := [key for key in _CHANGES if config.get(key)]:
        raise Unsupported(
            "an option that changes a plain LoRA",
            where=where,
            found=", ".join(changed),
            remedy="merge it with diffusers",
        )
    peft_form = method_of(LoRA()).peft
    assert peft_form is not None
    try:
        lora: LoRA = peft_form.from_config(config)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise FormatError(f"the configuration is not usable: {error}", where=where) from error
    return lora


DIFFUSERS = FORMATS.register(
    Format(
        "diffusers",
        "diffusers' keys (...lora_A.weight) in safetensors, one file",
        False,
        lambda path: any(_of_today(key).endswith((f".{_A}", f".{_B}")) for key in keys_of(path)),
        _read,
        _write,
        rank=40,
        parts=True,
        suffix=".safetensors",
    )
)
