"""PEFT's files of methods that it completes from the base by a decomposition, which is made here as PEFT makes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ..adapter_methods import Completed, Method, to_matrix
from ..base.linear_layers import on
from ..errors import ConfigError, Unsupported
from ..pack.pack import Pack, build
from .base import BaseModel


def from_peft(pack: Pack, base: BaseModel) -> Pack:
    """A pack as the method has it, of one whose parameters are those of PEFT's file.

    Raises:
        Unsupported: the decomposition of a weight is not unique, so that nobody can say what the file means.
    """
    return _changed(pack, base, lambda method: method.peft and method.peft.from_base)


def to_peft(pack: Pack, base: BaseModel | None) -> Pack | None:
    """The pack whose parameters are what PEFT's file has to hold on this base; None for methods that PEFT completes by itself.

    Raises:
        ConfigError: the base is needed, and was not named.
        Unsupported: see :func:`from_peft`; or PEFT has no such adapter at a site.
    """
    form = pack.method.peft
    if form is None or form.to_base is None or len(pack.methods) > 1:
        return None
    if base is None:
        raise ConfigError(f"what PEFT's file of '{pack.method.name}' holds depends on the weights of the base", where=f"pack '{pack.name}'",
                          expected="the base", remedy="name it with --base")
    return _changed(pack, base, lambda method: method.peft and method.peft.to_base)


def _changed(pack: Pack, base: BaseModel, hook: Callable[[Method], Completed | None]) -> Pack:
    checkpoint = base.checkpoint
    if checkpoint is None:
        raise Unsupported("this base is no checkpoint of transformers", where=base.folder, expected="safetensors with config.json",
                          remedy="name a base that is")
    pack = on(pack, checkpoint)
    change, claims, shared = hook(pack.method), pack.manifest, pack.shared()
    assert change is not None
    names = {group.path: base.weight_name(group.path, group.weight) for group in claims.groups if group.role == "adapter"}
    sites = {}
    for adapter in pack.adapters(lambda group: _widths(to_matrix(group.kind, checkpoint.read(names[group.path])))):
        weight = to_matrix(adapter.site.kind, checkpoint.read(names[adapter.site.path])).astype(np.float32)
        own = {name: value for name, value in adapter.params.items() if name not in shared}
        cfg, params = change(adapter.config, own, dataclasses.replace(adapter.site, weight=weight), _as_torch)
        sites[adapter.site] = (cfg, params)
    weights = {**{group.path: group.weight for group in claims.groups}, **names}
    return build(pack.name, pack.method, sites, shared=shared, full=pack.full(), task=claims.task, base=claims.base, weights=weights,
                 training=claims.training, license=claims.license, extensions=claims.extensions)


def _widths(weight: np.ndarray) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _as_torch(weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """U, S and V^T of a float32 weight, with the signs that torch's linear algebra gives on this machine's CPU, as PEFT takes them."""
    import torch  # noqa: PLC0415 - only these methods' conversion needs it

    return tuple(part.numpy() for part in torch.linalg.svd(torch.from_numpy(np.ascontiguousarray(weight)), full_matrices=False))
