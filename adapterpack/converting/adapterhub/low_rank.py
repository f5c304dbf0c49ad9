"""Converts AdapterHub's LoRA and (IA)^3 to adapterpack's.

Its (IA)^3 multiplies outputs at every place. A layer with fused query, key and value (GPT-2's) has factors
for those of the three that are adapted. Together they become one LoRA whose rank is the sum of theirs, with
zero rows elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...adapter_methods import Arrays, Site, Tensors, get, shapes_of
from ...errors import FormatError, Unsupported, excerpt
from ...manifest import MethodSites
from ...peft import site_of
from .. import drop_targets, finite_number
from .families import Family
from .settings import Settings, require_settings, setting

_FREE = frozenset(
    {
        "alpha",
        "architecture",
        "attn_matrices",
        "composition_mode",
        "dropout",
        "dtype",
        "init_weights",
        "init_weights_seed",
        "intermediate_lora",
        "leave_out",
        "output_lora",
        "r",
        "selfattn_lora",
    }
)
_UNDERSTOOD: dict[str, tuple[Any, ...]] = {
    "use_gating": (False,),
    "vera_d": (None,),
    "vera_b": (None,),
    "use_dora": (False,),
}
_PARTS = "qkv"


def read(config: Settings, places: Mapping[str, Tensors], family: Family, where: str) -> MethodSites:
    """Returns the sites of a LoRA or (IA)^3 by the path of their layers.

    Raises:
        Unsupported: a variant that no method of adapterpack has: AdapterHub's DoRA scales the layer's bias
            and leaves alpha out of the norm.
        FormatError: the tensors do not fit the settings.
    """
    require_settings(config, _UNDERSTOOD, _FREE, where)
    rank = setting(config, "r", int, where)
    alpha = finite_number(config.get("alpha"), f"{where}#/config/alpha")
    if not 0 < rank <= 1 << 16:
        raise FormatError("the rank is out of range", where=f"{where}#/config/r", found=rank)
    mode = setting(config, "composition_mode", str, where)
    names = {"add": {"lora_A", "lora_B"}, "scale": {"lora_B"}}.get(mode)
    if names is None:
        raise Unsupported(
            "a way of composing that is not known",
            where=f"{where}#/config/composition_mode",
            expected="add or scale",
            found=excerpt(mode),
        )
    chosen = setting(config, "attn_matrices", list, where)
    fused = {
        path
        for path in places
        for end, word in family.linear.items()
        if word == _PARTS and f".{path}".endswith(f".{end}")
    }
    sites = {}
    for path, tensors in sorted(places.items()):
        if tensors.keys() != names or any(value.ndim != 2 for value in tensors.values()):
            raise FormatError(
                "the tensors of a place are not those of the adapter's settings",
                where=f"{where}, {path}",
                expected=", ".join(sorted(names)),
                found=shapes_of(tensors),
            )
        enabled = [part in chosen for part in _PARTS] if path in fused else [True]
        site, cfg, params = (_lora if mode == "add" else _ia3)(tensors, rank, alpha, enabled, path, where)
        sites[site] = (cfg, params)
    return MethodSites(get("lora" if mode == "add" else "ia3"), sites)


def _lora(
    tensors: Tensors, rank: int, alpha: float, enabled: list[bool], path: str, where: str
) -> tuple[Site, Any, Arrays]:
    down = tensors["lora_A"]
    up = tensors["lora_B"]
    method = get("lora")
    count = sum(enabled)
    if len(enabled) > 1:
        parts = _split_rows(up, enabled, path, where)
        whole = np.zeros((len(enabled), parts.shape[1], count, up.shape[1]), up.dtype)
        whole[np.flatnonzero(enabled), :, np.arange(count)] = parts
        up = whole.reshape(-1, count * up.shape[1])
    if down.shape[0] != rank * count or up.shape[1] != rank * count:
        raise FormatError(
            "the rank that the file states is not that of its tensors",
            where=f"{where}, {path}",
            expected=rank * count,
            found=f"lora_A {down.shape}, lora_B {tensors['lora_B'].shape}",
        )
    cfg = drop_targets(method.config(r=rank * count, alpha=alpha * count))
    site, params = site_of(method, cfg, path, "linear", {"lora_A": down, "lora_B": up}, where)
    return site, cfg, params


def _ia3(
    tensors: Tensors, rank: int, alpha: float, enabled: list[bool], path: str, where: str
) -> tuple[Site, Any, Arrays]:
    factors = tensors["lora_B"]
    method = get("ia3")
    if factors.shape[1] != 1:
        raise FormatError(
            "(IA)^3 has one factor for each output", where=f"{where}, {path}", found=factors.shape
        )
    if len(enabled) > 1:
        parts = _split_rows(factors, enabled, path, where)
        whole = np.ones((len(enabled), *parts.shape[1:]), factors.dtype)
        whole[np.flatnonzero(enabled)] = parts
        factors = whole.reshape(-1, 1)
    cfg = drop_targets(method.config())
    wide = factors if alpha == 1 else (factors.astype(np.float64) * alpha).astype(np.float32)
    site, params = site_of(method, cfg, path, "linear", {"ia3_l": wide}, where)
    return site, cfg, params


def _split_rows(up: np.ndarray, enabled: list[bool], path: str, where: str) -> np.ndarray:
    """Returns ``[parts, rows of a part, columns]`` of the parts that are enabled."""
    if not sum(enabled) or len(up) % sum(enabled):
        raise FormatError(
            "the rows are not those of the parts that the settings adapt",
            where=f"{where}, {path}",
            found=up.shape,
            expected=f"a multiple of {sum(enabled)}",
        )
    return up.reshape(sum(enabled), -1, up.shape[1])
