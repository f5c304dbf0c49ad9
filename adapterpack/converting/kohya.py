"""Reads and writes kohya's LoRA files: ``<model>_<module path with underscores>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``.

The change is ``alpha / r * up @ down``. Names with underscores do not say where the dots were; reading them takes the base's module names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, NonFinite, SiteNotFound, Unsupported, nearest
from ..io import safetensors
from ..io.safetensors import SafetensorsFile
from ..pack.pack import Pack
from .base import BaseModel, bind_to_base
from .factors import SiteFactors, lora_pack, require_pairs, site_factors
from .folder_formats import dequantized
from .format import Format, Reading, Source, listed, refuse_full_modules, require_base
from .lora_keys import choose_model, is_text_model, keys_of, missing_alpha_note, open_file, several_models_note

_DOWN, _UP, _ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
_PREFIXES = ("lora_unet", "lora_te1", "lora_te2", "lora_te3", "lora_te", "lora_transformer")
"""Key prefixes, each for one model of the pipeline."""
_NUMBER = re.compile(r"_(\d+)_")


def is_key(key: str) -> bool:
    """Whether a key is one of kohya's.

    Example:
        >>> is_key("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"), is_key("unet.conv.lora_A.weight")
        (True, False)
    """
    module, dot, leaf = key.partition(".")
    return bool(dot) and _prefix(module) is not None and leaf in (_DOWN, _UP, _ALPHA)


def _prefix(module: str) -> str | None:
    return next((prefix for prefix in _PREFIXES if module.startswith(f"{prefix}_")), None)


def flat(path: str) -> str:
    """A module path as kohya writes it.

    Example:
        >>> flat("down_blocks.0.attn1.to_q")
        'down_blocks_0_attn1_to_q'
    """
    return path.replace(".", "_")


def _write(pack: Pack, out: Path, base: BaseModel | None) -> tuple[str, ...]:
    refuse_full_modules(pack, "kohya")
    plain, notes = dequantized(pack)
    manifest = pack.manifest
    tensors: dict[str, np.ndarray] = {}
    recorded = manifest.training.get("part")
    prefix = recorded if recorded in _PREFIXES else "lora_te" if is_text_model(base, manifest.base.model_type) else "lora_unet"
    for site in site_factors(plain, "kohya"):
        name = f"{prefix}_{flat(site.path)}"
        if f"{name}.{_DOWN}" in tensors:
            raise Unsupported("two modules have one name when their dots become underscores", where=f"pack '{pack.name}'", found=name,
                              remedy="convert to diffusers or peft")
        tensors |= {f"{name}.{_DOWN}": site.down, f"{name}.{_UP}": site.up, f"{name}.{_ALPHA}": _scalar(site.alpha)}
    safetensors.write(out, tensors, {"ss_network_module": "networks.lora"})
    return (*notes, f"keys begin with {prefix}_") if recorded is None else notes


def _scalar(alpha: float) -> np.ndarray:
    """Alpha as kohya stores it, a float32; a float64 where float32 would round it."""
    return np.array(alpha, np.float32 if float(np.float32(alpha)) == alpha else np.float64)


def _read(source: Source) -> Reading:
    base = require_base(source.base, source.path, "names with underscores do not say where the dots of a module's path are")
    file = open_file(source)
    modules = _modules(file, source)
    part, notes = choose_model(_parts(modules), source)
    of_part = {module: leaves for module, leaves in modules.items() if _prefix(module) == part}
    pairs, without_alpha = _factors(file, of_part, source)
    paths = _paths(base, {module.removeprefix(f"{part}_") for module in of_part}, source)
    sites = {(path := paths[module.removeprefix(f"{part}_")]): pair._replace(path=path) for module, pair in pairs.items()}
    return Reading(bind_to_base(lora_pack(source, sites, "kohya", part=part), base), notes + missing_alpha_note(without_alpha))


def _read_without_base(source: Source) -> Reading:
    """All models of the file; dots are restored only around numbers, where they are certain."""
    file = open_file(source)
    modules = _modules(file, source)
    pairs, without_alpha = _factors(file, modules, source)
    sites = {(path := _NUMBER.sub(r".\1.", module)): pair._replace(path=path) for module, pair in pairs.items()}
    return Reading(lora_pack(source, sites, "kohya"), several_models_note(_parts(modules)) + missing_alpha_note(without_alpha))


def _modules(file: SafetensorsFile, source: Source) -> dict[str, dict[str, str]]:
    modules: dict[str, dict[str, str]] = {}
    for key in file.tensors:
        if not is_key(key):
            raise Unsupported("a key that is not of a plain LoRA", where=source.path, found=key, expected=f"{_DOWN}, {_UP}, {_ALPHA}",
                              remedy="convert it to plain LoRA with the tool that made it (LoHa, LoKr, DoRA and norms are not read)")
        module, _, leaf = key.partition(".")
        modules.setdefault(module, {})[leaf] = key
    return modules


def _factors(file: SafetensorsFile, modules: Mapping[str, Mapping[str, str]], source: Source) -> tuple[dict[str, SiteFactors], list[str]]:
    """The factors of each module by its flat name, and the modules without an alpha."""
    require_pairs(modules, (_DOWN, _UP), source.path)
    pairs, without_alpha = {}, []
    for module, leaves in modules.items():
        down, up = (_matrix(file.read(leaves[leaf]), leaves[leaf], source) for leaf in (_DOWN, _UP))
        if _ALPHA in leaves:
            scale = _number(file.read(leaves[_ALPHA]), leaves[_ALPHA], source) / max(1, down.shape[0])
        else:
            without_alpha.append(module)
            scale = 1.0
        pairs[module] = SiteFactors(module, down, up, scale)
    return pairs, without_alpha


def _parts(modules: Mapping[str, Any]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for module in modules:
        parts.setdefault(_prefix(module) or "", []).append(module)
    return parts


def _paths(base: BaseModel, wanted: set[str], source: Source) -> dict[str, str]:
    """Flat name -> module path of the base.

    Raises:
        SiteNotFound: the base has no such module.
        Unsupported: two of its modules have that name.
    """
    by_name: dict[str, list[str]] = {}
    for path in base.modules():
        by_name.setdefault(flat(path), []).append(path)
    for name in sorted(wanted):
        if name not in by_name:
            raise SiteNotFound("the base has no module of this name", where=source.path, found=name, remedy=nearest(name, by_name))
        if len(by_name[name]) > 1:
            raise Unsupported("the name fits several modules of the base", where=source.path, expected="one", found=listed(by_name[name]),
                              remedy="use the adapter in the form of diffusers or PEFT, which keep the dots")
    return {name: by_name[name][0] for name in wanted}


def _matrix(value: np.ndarray, key: str, source: Source) -> np.ndarray:
    if value.ndim != 2:
        raise Unsupported("an adapter of a layer that is not linear", where=f"{source.path}, {key}", expected="a matrix",
                          found=f"shape {list(value.shape)}", remedy="leave convolutions out of the adapter")
    return value


def _number(value: np.ndarray, key: str, source: Source) -> float:
    if value.size != 1 or value.dtype.kind in "biu":
        raise FormatError("alpha must be one floating-point number", where=f"{source.path}, {key}", found=f"{value.dtype} {value.shape}")
    number = float(value.reshape(())[()])
    if not math.isfinite(number):
        raise NonFinite("alpha is not finite", where=f"{source.path}, {key}", found=number)
    return number


KOHYA = Format("kohya", "kohya's keys (lora_unet_..., lora_te_...) in safetensors, one file", False,
               lambda path: any(_prefix(key) for key in keys_of(path)), _read, _write, _read_without_base, parts=True)
