"""Replaces the values of an attached adapter with those of another pack, without recompiling the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ...adapter_methods import Site
from ...adapter_methods.nodes.composed import pack_config
from ...errors import Unsupported
from ...pack import SHARED, Pack, as_pack
from ...paths import StrPath
from ..layers import HeadLabels, adapted_layers, name_outputs, require_names, require_unmerged, saved_modules
from ..layers.tensors import as_tensor
from ..model_base import require_model_base
from ..wrap import shape_at
from .state import load_adapter_state_dict

_IN_TRAINING = {"dropout"}
"""Hyper-parameters that act only in training, so the packs may differ in them; the adapter keeps its own."""


def hotswap(model: nn.Module, name: str, pack: Pack | StrPath, check_base: bool = True) -> nn.Module:
    """Puts the values of ``pack``, or of the one in a folder, into the adapter ``name`` of a model, in place:
    modules, graphs and compiled code stay.

    The pack must have the same methods at the same sites, with the same hyper-parameters and tensor shapes,
    so that nothing changes that ``torch.compile`` has specialised on. Attach a pack that differs as another
    adapter. If an error is raised, nothing has changed.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
        BaseMismatch: the model is not the pack's base.
        Unsupported: the pack has other methods, sites or hyper-parameters; the error names them.
        SiteNotFound, FormatError: the pack has other tensors, see
            :func:`~adapterpack.load_adapter_state_dict`.

    Example:
        >>> model = attach(base, load("packs/tickets"))  # doctest: +SKIP
        >>> compiled = torch.compile(model)  # doctest: +SKIP
        >>> hotswap(model, "tickets", load("packs/tickets-v2"))  # doctest: +SKIP
    """
    require_unmerged(model)
    require_names(model, [name])
    pack = as_pack(pack)
    if check_base:
        require_model_base(model, pack)
    layers = {
        (module._site.path, module._held[name].method.name): module for module in adapted_layers(model, name)
    }
    shared = pack.shared()
    state = {f"{SHARED}.{key}": _tensor(value) for key, value in shared.items()}
    sites = {path: module._site for (path, _), module in layers.items()}
    # A site that the adapter does not have is refused below, with its name.
    for adapter in pack.adapters(
        lambda group: shape_at(group, sites.get(group.path, Site(group.path, 0, 0)))
    ):
        path, method = adapter.site.path, adapter.method.name
        if (path, method) not in layers:
            raise Unsupported(
                "the pack changes a site that the adapter does not change by that method",
                where=path,
                found=method,
                remedy="attach it as another adapter",
            )
        _require_equal(layers[path, method]._held[name].config, adapter.config, f"{name}, {path}")
        state |= {
            f"{path}.{key}": _tensor(value)
            for key, value in adapter.params.items()
            if method != pack.method.name or key not in shared
        }
    state |= {
        f"{path}.{key}": _tensor(value)
        for path, params in pack.full().items()
        for key, value in params.items()
    }
    load_adapter_state_dict(model, name, state)
    if (labels := HeadLabels.of(pack)) is not None:
        for module in saved_modules(model, name):
            module._labels[name] = labels
        name_outputs(model)
    return model


def _tensor(value: np.ndarray) -> torch.Tensor:
    """Returns a numpy array as a tensor on the CPU."""
    return as_tensor(value, torch.device("cpu"))


def _require_equal(own: Any, other: Any, where: str) -> None:
    """Raises if two configs differ in hyper-parameters that matter outside of training."""
    mine, theirs = pack_config(own), pack_config(other)
    differing = sorted(
        key for key in (mine.keys() | theirs.keys()) - _IN_TRAINING if mine.get(key) != theirs.get(key)
    )
    if differing:
        raise Unsupported(
            "the pack has other hyper-parameters, which compiled code would not see change",
            where=where,
            expected=", ".join(f"{key}={mine.get(key)}" for key in differing),
            found=", ".join(f"{key}={theirs.get(key)}" for key in differing),
            remedy="attach it as another adapter",
        )
