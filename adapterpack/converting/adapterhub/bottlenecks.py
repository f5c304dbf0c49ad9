"""Converts AdapterHub's bottlenecks (Houlsby, Pfeiffer, parallel, Compacter) to adapterpack's.

Its Houlsby and parallel adapters act before the residual and the norm of their sub-layer, as adapterpack's
do. Its Pfeiffer adapter reads the sum after the layer's own norm. In a pre-norm model that is the residual
stream; in a post-norm model no bottleneck of adapterpack can read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...adapter_methods import Arrays, Site, Tensors, check_shapes, get, shapes_of
from ...errors import FormatError, Unsupported, excerpt
from ...io import FrozenStruct
from ...manifest import MethodSites
from ...resources import table
from .. import finite_number
from .families import Family
from .settings import Settings, require_settings, setting

Sites = dict[Site, tuple[Any, Arrays]]


class BottleneckNames(FrozenStruct):
    """The contents of ``bottlenecks.toml``."""

    free: frozenset[str]
    acts: dict[str, str]
    plain: dict[str, str]
    phm: dict[str, str]


_NAMES = table("converting/adapterhub/bottlenecks.toml", BottleneckNames)
_UNDERSTOOD: dict[str, tuple[Any, ...]] = {
    "original_ln_after": (True,),
    "ln_before": (False,),
    "ln_after": (False,),
    "use_gating": (False,),
    "residual_before_ln": (True,),
    "adapter_residual_before_ln": (False, True),
    "inv_adapter": (None,),
    "cross_adapter": (False, True),
    "factorized_phm_W": (True,),
    "shared_W_phm": (False,),
    "shared_phm_rule": (True,),
    "factorized_phm_rule": (False, True),
    "phm_bias": (True,),
}


def read(
    config: Settings, places: Mapping[str, Tensors], shared: Tensors, family: Family, where: str
) -> tuple[MethodSites, Arrays]:
    """Returns the sites of a bottleneck adapter by AdapterHub's places, and the parameters that they share.

    Raises:
        Unsupported: a variant that no method of adapterpack has.
        FormatError: the tensors do not fit the settings.
    """
    require_settings(config, _UNDERSTOOD, _NAMES.free, where)
    parallel = setting(config, "is_parallel", bool, where)
    stream = setting(config, "original_ln_before", bool, where)
    phm = setting(config, "phm_layer", bool, where)
    act = setting(config, "non_linearity", str, where)
    if act.lower() not in _NAMES.acts:
        raise Unsupported(
            "an activation that no bottleneck here has",
            where=f"{where}#/config/non_linearity",
            expected=", ".join(_NAMES.acts),
            found=excerpt(act),
            remedy="keep it with the library that made it",
        )
    stream &= not parallel
    if stream and not family.norm_first:
        raise Unsupported(
            "this adapter reads what the layer's own norm makes of the sum, which no adapter here reads "
            "where a model normalizes last",
            where=f"{where}#/config/original_ln_before",
            expected="false",
            found="true",
            remedy=(
                "train it as Houlsby's (double_seq_bn) or in parallel (par_bn), or keep it with the library "
                "that made it"
            ),
        )
    settings: dict[str, Any] = {
        "act": _NAMES.acts[act.lower()],
        "scaling": finite_number(config.get("scaling", 1.0), f"{where}#/config/scaling"),
        "targets": "all-layers",
        "source": family.entry if parallel else "output",
    }
    method = get("compacter" if phm else "bottleneck")
    names = _NAMES.phm if phm else _NAMES.plain
    if phm:
        settings |= {
            "phm_dim": setting(config, "phm_dim", int, where),
            "phm_rank": setting(config, "phm_rank", int, where),
            "shared_rule": True,
        }
    sites = {}
    for place, tensors in sorted(places.items()):
        found = family.block(place)
        if found is None:
            raise Unsupported(
                "an adapter at a place that is not known here",
                where=f"{where}, {place}",
                expected=", ".join(family.blocks),
                remedy="keep it with the library that made it",
            )
        layer, end, last = found
        if tensors.keys() != names.keys():
            raise FormatError(
                "the tensors of a place are not those of the adapter's settings",
                where=f"{where}, {place}",
                expected=", ".join(sorted(names)),
                found=", ".join(sorted(tensors)),
            )
        if stream and not last:
            raise Unsupported(
                "an adapter on the residual stream between attention and feed-forward",
                where=f"{where}, {place}",
                remedy="keep it with the library that made it",
            )
        params = {
            ours: np.ascontiguousarray(tensors[their].swapaxes(1, 2))
            if tensors[their].ndim == 3
            else tensors[their]
            for their, ours in names.items()
        }
        path = layer if stream else f"{layer}.{end}"
        width = len(params["up_bias"].reshape(-1))
        cfg = _config(
            method, settings, path, width, config.get("reduction_factor"), layer, f"{where}#/config"
        )
        site = Site(path, width, width, "block")
        check_shapes(method, cfg, site, params, where)
        sites[site] = (cfg, params)
    rules = {
        name: np.ascontiguousarray(value.swapaxes(-1, -2)) for name, value in _rules(shared, where).items()
    }
    wanted = (
        method.storage.shared.shapes(next(iter(sites.values()))[0], list(sites))
        if method.storage.shared and sites
        else {}
    )
    if shapes_of(rules) != wanted:
        raise FormatError(
            "the rules that all places share are not those of the adapter's settings",
            where=where,
            expected=wanted,
            found=shapes_of(rules),
        )
    return MethodSites(method, sites), rules


def _rules(shared: Tensors, where: str) -> Arrays:
    """Returns the rules that all places share; multiplies out a rule that is stored as two factors, whose
    rank is always 1, whatever the settings say.
    """
    if shared.keys() == {"phm_rule_left", "phm_rule_right"}:
        left, right = shared["phm_rule_left"], shared["phm_rule_right"]
        if left.ndim == right.ndim == 3 and left.shape == right.swapaxes(1, 2).shape:
            return {"rule": (left.astype(np.float64) @ right.astype(np.float64)).astype(np.float32)}
    elif not shared:
        return {}
    elif shared.keys() == {"phm_rule"} and shared["phm_rule"].ndim == 3:
        return {"rule": shared["phm_rule"]}
    raise FormatError("tensors of no place of the model", where=where, found=shapes_of(shared))


def _config(
    method: Any, settings: Settings, path: str, width: int, reduction: Any, layer: str, where: str
) -> Any:
    """Returns the config at one site; its reduction may be one number for all layers, or one for each layer
    number with a default.
    """
    if isinstance(reduction, dict):
        reduction = reduction.get(layer.rpartition(".")[2], reduction.get("default"))
    try:
        return method.config(**settings, reduction=finite_number(reduction, f"{where}/reduction_factor")).at(
            path
        )
    except ValueError as error:
        raise FormatError(f"the settings of the adapter are not usable: {error}", where=where) from error
