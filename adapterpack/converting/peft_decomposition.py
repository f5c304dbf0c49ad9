"""Converts packs of methods whose PEFT file depends on a decomposition of the base's weights, computed as
PEFT computes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ..adapter_methods import Completed, Estimate, Method, Site, Tensors, get, to_matrix
from ..errors import ConfigError
from ..manifest import MethodSites
from ..pack import Pack, match_layers
from .base import BaseModel
from .packs import rebuild


def from_peft(pack: Pack, base: BaseModel, completed: Completed | None = None) -> Pack:
    """Converts a pack with the parameters of PEFT's file to one with the method's own parameters, by
    ``completed``, or the method's own conversion.

    Raises:
        Unsupported: the decomposition of a weight is not unique, so the file is ambiguous.
    """
    return _transform(
        pack,
        base,
        lambda method: completed or (method.peft and method.peft.overrides.get("from_peft_with_base")),
    )


def to_peft(pack: Pack, base: BaseModel | None) -> Pack | None:
    """Returns the pack with the parameters that PEFT's file has on this base; None for methods whose file
    does not depend on the base.

    Raises:
        ConfigError: the conversion needs the base, which the caller did not name.
        Unsupported: the decomposition is not unique, or PEFT has no such adapter at a site.
    """
    peft_form = pack.method.peft
    if peft_form is None or peft_form.to_peft_with_base is None or len(pack.methods) > 1:
        return None
    if base is None:
        raise ConfigError(
            f"what PEFT's file of '{pack.method.name}' holds depends on the weights of the base",
            where=pack.where,
            expected="the base",
            remedy="name it with --base",
        )
    return _transform(pack, base, lambda method: method.peft and method.peft.to_peft_with_base)


def _transform(pack: Pack, base: BaseModel, hook: Callable[[Method], Completed | None]) -> Pack:
    checkpoint = base.checkpoint
    pack = match_layers(pack, checkpoint)
    change = hook(pack.method)
    claims = pack.manifest
    shared = pack.shared()
    assert change is not None
    names = {group.path: base.weight_name(group.path, group.weight) for group in claims.adapter_groups}
    sites: dict[Site, tuple[Any, Tensors]] = {}
    secondary: dict[str, dict[Site, tuple[Any, Tensors]]] = {}
    for adapter in pack.adapters(
        lambda group: _widths(to_matrix(group.kind, checkpoint.read(names[group.path])))
    ):
        if adapter.method.name != pack.method.name:
            secondary.setdefault(adapter.method.name, {})[adapter.site] = (adapter.config, adapter.params)
            continue
        weight = to_matrix(adapter.site.kind, checkpoint.read(names[adapter.site.path])).astype(np.float32)
        bias = f"{names[adapter.site.path].removesuffix('weight')}bias"
        bias_values = checkpoint.read(bias).astype(np.float32) if bias in checkpoint.tensors else None
        site_params = {name: value for name, value in adapter.params.items() if name not in shared}
        here = dataclasses.replace(adapter.site, weight=weight, base_bias=bias_values, shared=shared)
        cfg, params = change(adapter.config, site_params, here, _torch_svd)
        sites[adapter.site] = (cfg, params)
    common = pack.method.storage.shared
    kept = {} if common is None or not sites else common.shapes(next(iter(sites.values()))[0], list(sites))
    shared = {name: value for name, value in shared.items() if name in kept}
    guests = [MethodSites(get(name), those) for name, those in secondary.items()]
    return rebuild(pack, sites, names, secondary=guests, shared=shared)


def _widths(weight: np.ndarray) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _torch_svd(weight: np.ndarray, estimate: Estimate | None = None) -> tuple[np.ndarray, ...]:
    """Returns U, S and V^T of a float32 weight, with the signs that torch gives on this machine's CPU, since
    PEFT uses these.
    """
    import torch  # noqa: PLC0415 - only these methods' conversion needs it

    matrix = torch.from_numpy(np.ascontiguousarray(weight))
    if estimate is None:
        return tuple(part.numpy() for part in torch.linalg.svd(matrix, full_matrices=False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(estimate.seed)
        U, S, V = torch.svd_lowrank(matrix, q=estimate.rank, niter=estimate.niter)
    return U.numpy(), S.numpy(), V.T.numpy()
