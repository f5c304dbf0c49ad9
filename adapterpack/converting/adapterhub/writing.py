"""Writes packs as AdapterHub's settings and tensors, if its settings can express exactly the pack's sites.

The library derives the places of an adapter from its settings, and silently leaves parameters that a file
lacks at their initial values. So a pack can be written only if settings select exactly its sites: the same
ones in every layer that has any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ...adapter_methods.forms.blocks import entry_of
from ...errors import Unsupported
from ...pack import Adapter, Pack
from .. import Notes, list_first, pad_to_one_rank, site_factors
from .families import Family

_ACTS = {"relu": "relu", "silu": "swish", "gelu": "gelu_orig", "gelu_tanh": "gelu_new", "tanh": "tanh"}
_COMMON = {"dropout": 0.0, "init_weights_seed": None}


class Written(NamedTuple):
    """The settings, the tensors by place and part (``bert.encoder.layer.0.output.adapters``,
    ``adapter_up.bias``), and notes.
    """

    config: dict[str, Any]
    tensors: dict[tuple[str, str], np.ndarray]
    notes: Notes = ()


def to_settings(pack: Pack, family: Family, layers: int) -> Written:
    """Converts a pack of one method to AdapterHub's settings and tensors, for a model with ``layers`` layers.

    Raises:
        Unsupported: the library has no such adapter, or no settings for its sites.
    """
    if len(pack.methods) > 1:
        raise _refused(
            pack,
            "an adapter of AdapterHub's has one method",
            ", ".join(method.name for method in pack.methods),
        )
    if pack.method.name == "bottleneck":
        return _bottleneck(pack, family, layers)
    if pack.method.name == "ia3":
        return _ia3(pack, family, layers)
    return _lora(pack, family, layers)


def _refused(pack: Pack, why: str, found: str) -> Unsupported:
    return Unsupported(why, where=pack.where, found=found[:200], remedy="keep the pack as it is")


def _linear(pack: Pack, paths: Iterable[str], family: Family, layers: int) -> dict[str, Any]:
    """Returns the settings that select these linear layers."""
    words: dict[int, set[str]] = {}
    for path in paths:
        end = next(
            (end for end, word in family.linear.items() if path.endswith(f".{end}") and word != "qkv"), None
        )
        number = None if end is None else path.removesuffix(f".{end}").rpartition(".")[2]
        if end is None or number is None or not number.isdecimal():
            raise _refused(pack, "AdapterHub adapts no such layer in this kind of model", path)
        words.setdefault(int(number), set()).add(family.linear[end])
    chosen = _same(pack, words)
    return {
        **_COMMON,
        "attn_matrices": [part for part in "qkv" if part in chosen],
        "selfattn_lora": bool(chosen & set("qkv")),
        "intermediate_lora": "intermediate" in chosen,
        "output_lora": "output" in chosen,
        "leave_out": _left_out(words, layers),
        "architecture": "lora",
        "use_gating": False,
        "use_dora": False,
        "vera_d": None,
        "vera_b": None,
        "dtype": None,
    }


def _same(pack: Pack, words: Mapping[int, set[str]]) -> set[str]:
    first = next(iter(words.values()), set())
    if other := next((number for number, here in words.items() if here != first), None):
        raise _refused(
            pack,
            "AdapterHub's settings name the same places in every layer",
            f"layer {other}: {list_first(sorted(words[other]))}",
        )
    return first


def _left_out(numbers: Iterable[int], layers: int) -> list[int]:
    return sorted(set(range(layers)) - set(numbers))


def _lora(pack: Pack, family: Family, layers: int) -> Written:
    sites = list(site_factors(pack, "adapterhub"))
    config = _linear(pack, (site.path for site in sites), family, layers)
    padded, rank, scale, notes = pad_to_one_rank(sites, "AdapterHub", "lora_B")
    tensors = {
        (f"{path}.loras", part): value
        for path, pair in padded.items()
        for part, value in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    return Written(
        {**config, "r": rank, "alpha": scale * rank, "composition_mode": "add", "init_weights": "lora"},
        tensors,
        notes,
    )


def _ia3(pack: Pack, family: Family, layers: int) -> Written:
    adapters = list(pack.adapters())
    if inner := [adapter.site.path for adapter in adapters if adapter.config.feedforward]:
        raise _refused(pack, "AdapterHub's (IA)^3 scales outputs alone", list_first(inner))
    config = _linear(pack, (adapter.site.path for adapter in adapters), family, layers)
    tensors = {(f"{adapter.site.path}.loras", "lora_B"): adapter.params["ia3_l"] for adapter in adapters}
    return Written(
        {**config, "r": 1, "alpha": 1, "composition_mode": "scale", "init_weights": "ia3"}, tensors
    )


def _bottleneck(pack: Pack, family: Family, layers: int) -> Written:
    adapters = list(pack.adapters())
    places = {adapter.site.path: _place(pack, adapter, family) for adapter in adapters}
    forms = {
        (adapter.config.act, adapter.config.scaling, adapter.config.norm, parallel, stream)
        for adapter, (_, _, parallel, stream) in zip(adapters, places.values(), strict=True)
    }
    if len(forms) > 1:
        raise _refused(
            pack, "AdapterHub's settings are the same at every site", list_first(sorted(map(str, forms)))
        )
    act, scaling, norm, parallel, stream = next(iter(forms))
    if norm or act not in _ACTS:
        raise _refused(pack, "AdapterHub has no such bottleneck", f"act {act}, norm {norm}")
    words: dict[int, set[str]] = {}
    for layer, their, _, _ in places.values():
        words.setdefault(int(layer.rpartition(".")[2]), set()).add(their)
    chosen = _same(pack, words)
    (attention, ffn) = family.blocks
    tensors: dict[tuple[str, str], np.ndarray] = {}
    reductions: dict[str, float] = {}
    for adapter in adapters:
        layer, their, _, _ = places[adapter.site.path]
        if (
            reductions.setdefault(layer.rpartition(".")[2], adapter.config.reduction)
            != adapter.config.reduction
        ):
            raise _refused(
                pack, "AdapterHub has one reduction for a layer", f"{layer}: {adapter.config.reduction}"
            )
        params = adapter.params
        place = f"{layer}.{their}.adapters"
        zeros = {
            "down_bias": np.zeros(len(params["down"]), np.float32),
            "up_bias": np.zeros(len(params["up"]), np.float32),
        }
        for part, name in (
            ("adapter_down.0.weight", "down"),
            ("adapter_down.0.bias", "down_bias"),
            ("adapter_up.weight", "up"),
            ("adapter_up.bias", "up_bias"),
        ):
            tensors[place, part] = params[name] if name in params else zeros[name]
    return Written(
        {
            **_COMMON,
            "mh_adapter": attention in chosen,
            "output_adapter": ffn in chosen,
            "reduction_factor": _reduction(reductions),
            "non_linearity": _ACTS[act],
            "scaling": scaling,
            "is_parallel": parallel,
            "original_ln_before": stream,
            "original_ln_after": True,
            "ln_before": False,
            "ln_after": False,
            "residual_before_ln": True,
            "adapter_residual_before_ln": False,
            "init_weights": "bert",
            "use_gating": False,
            "inv_adapter": None,
            "inv_adapter_reduction_factor": None,
            "cross_adapter": False,
            "leave_out": _left_out(words, layers),
            "phm_layer": False,
            "stochastic_depth": 0.0,
        },
        tensors,
    )


def _reduction(by_layer: Mapping[str, float]) -> Any:
    """Returns one number if all layers have the same, else a number for each layer, and a default for layers
    without an adapter.
    """
    first = next(iter(by_layer.values()))
    return first if set(by_layer.values()) == {first} else {**by_layer, "default": first}


def _place(pack: Pack, adapter: Adapter, family: Family) -> tuple[str, str, bool, bool]:
    """Returns (path of the layer, AdapterHub's place in it, whether it is parallel, whether it is on the
    residual stream) of a site.
    """
    path, source = adapter.site.path, adapter.config.source
    ffn = list(family.blocks)[-1]
    if path.rpartition(".")[2].isdecimal() and family.norm_first and source == "output":
        return path, ffn, False, True
    for their, ours in family.blocks.items():
        layer = path.removesuffix(f".{ours}")
        if layer == path or not layer.rpartition(".")[2].isdecimal():
            continue
        if source == "output":
            return layer, their, False, False
        if their == ffn and source == entry_of(family.entry, path):
            return layer, their, True, False
    raise _refused(
        pack, "AdapterHub has no bottleneck at such a site in this kind of model", f"{path}, reading {source}"
    )
