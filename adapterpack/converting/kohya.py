"""Kohya's LoRA keys: ``<model>_<module path with underscores>`` with ``.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``.

The change is ``alpha / r * up @ down``. A name with underscores does not say where its dots were: reading it takes the base's own names.
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
from .base import BaseModel, bound_to
from .factors import Factors, factors, lora_pack, paired
from .folders import floated
from .format import Format, Reading, Source, listed, need_base, refuse_whole
from .lora_file import chosen, is_text_model, keys_of, no_alpha, opened, several

_DOWN, _UP, _ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
_PREFIXES = ("lora_unet", "lora_te1", "lora_te2", "lora_te3", "lora_te", "lora_transformer")
"""Beginnings of keys, each of another model of the pipeline."""
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
    refuse_whole(pack, "kohya")
    plain, notes = floated(pack)
    manifest = pack.manifest
    tensors: dict[str, np.ndarray] = {}
    known = manifest.training.get("part")
    prefix = known if known in _PREFIXES else "lora_te" if is_text_model(base, manifest.base.model_type) else "lora_unet"
    for site in factors(plain, "kohya"):
        name = f"{prefix}_{flat(site.path)}"
        if f"{name}.{_DOWN}" in tensors:
            raise Unsupported("two modules have one name when their dots become underscores", where=f"pack '{pack.name}'", found=name,
                              remedy="convert to diffusers or peft")
        tensors |= {f"{name}.{_DOWN}": site.down, f"{name}.{_UP}": site.up, f"{name}.{_ALPHA}": _scalar(site.alpha)}
    safetensors.write(out, tensors, {"ss_network_module": "networks.lora"})
    return (*notes, f"keys begin with {prefix}_") if known is None else notes


def _scalar(alpha: float) -> np.ndarray:
    """Alpha as kohya stores it, a float32; a float64 where float32 would round it."""
    return np.array(alpha, np.float32 if float(np.float32(alpha)) == alpha else np.float64)


def _read(source: Source) -> Reading:
    base = need_base(source.base, source.path, "names with underscores do not say where the dots of a module's path are")
    file = opened(source)
    modules = _modules(file, source)
    part, notes = chosen(_parts(modules), source)
    mine = {module: leaves for module, leaves in modules.items() if _prefix(module) == part}
    found, silent = _factors(file, mine, source)
    paths = _paths(base, {module.removeprefix(f"{part}_") for module in mine}, source)
    sites = {(path := paths[module.removeprefix(f"{part}_")]): pair._replace(path=path) for module, pair in found.items()}
    return Reading(bound_to(lora_pack(source, sites, "kohya", part=part), base), notes + no_alpha(silent))


def _outline(source: Source) -> Reading:
    """Every model of the file; dots stand where they are sure, around numbers."""
    file = opened(source)
    modules = _modules(file, source)
    found, silent = _factors(file, modules, source)
    sites = {(path := _NUMBER.sub(r".\1.", module)): pair._replace(path=path) for module, pair in found.items()}
    return Reading(lora_pack(source, sites, "kohya"), several(_parts(modules)) + no_alpha(silent))


def _modules(file: SafetensorsFile, source: Source) -> dict[str, dict[str, str]]:
    modules: dict[str, dict[str, str]] = {}
    for key in file.tensors:
        if not is_key(key):
            raise Unsupported("a key that is not of a plain LoRA", where=source.path, found=key, expected=f"{_DOWN}, {_UP}, {_ALPHA}",
                              remedy="convert it to plain LoRA with the tool that made it (LoHa, LoKr, DoRA and norms are not read)")
        module, _, leaf = key.partition(".")
        modules.setdefault(module, {})[leaf] = key
    return modules


def _factors(file: SafetensorsFile, modules: Mapping[str, Mapping[str, str]], source: Source) -> tuple[dict[str, Factors], list[str]]:
    """The factors of each module by its flat name, and the modules without an alpha."""
    paired(modules, (_DOWN, _UP), source.path)
    found, silent = {}, []
    for module, leaves in modules.items():
        down, up = (_matrix(file.read(leaves[leaf]), leaves[leaf], source) for leaf in (_DOWN, _UP))
        if _ALPHA in leaves:
            scale = _number(file.read(leaves[_ALPHA]), leaves[_ALPHA], source) / max(1, down.shape[0])
        else:
            silent.append(module)
            scale = 1.0
        found[module] = Factors(module, down, up, scale)
    return found, silent


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
    known: dict[str, list[str]] = {}
    for path in base.modules():
        known.setdefault(flat(path), []).append(path)
    for name in sorted(wanted):
        if name not in known:
            raise SiteNotFound("the base has no module of this name", where=source.path, found=name, remedy=nearest(name, known))
        if len(known[name]) > 1:
            raise Unsupported("the name fits several modules of the base", where=source.path, expected="one", found=listed(known[name]),
                              remedy="use the adapter in the form of diffusers or PEFT, which keep the dots")
    return {name: known[name][0] for name in wanted}


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
               lambda path: any(_prefix(key) for key in keys_of(path)), _read, _write, _outline)
