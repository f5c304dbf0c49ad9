"""Extracts one adapter from a model as the parts that a pack is built from."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ..adapter_methods import Method, Site
from ..errors import Unsupported
from ..manifest.secondary_methods import MethodSites
from .layers.active import adapted_layers, require_names, wrappers_of
from .layers.modules_to_save import SavedModule
from .layers.tensors import as_numpy
from .layers.wrapper import path_order
from .unused import unused_of


class Parts(NamedTuple):
    """One adapter, as a pack stores it.

    ``adapters`` maps each site to its config and its parameters in stored form; ``secondary`` holds the sites
    of further methods; ``shared`` the parameters that all sites share; ``full`` maps the path of each module
    that was trained in full to its parameters.
    """

    method: Method
    adapters: dict[Site, tuple[Any, dict[str, np.ndarray]]]
    secondary: list[MethodSites]
    shared: dict[str, np.ndarray]
    full: dict[str, dict[str, np.ndarray]]


def parts_of(model: nn.Module, name: str) -> Parts:
    """Returns the parts of the adapter ``name``, without layers that the model does not use.

    Raises:
        UnknownAdapter: the model has no adapter of that name.
    """
    require_names(model, [name])
    unused = unused_of(model, name)
    adapted = [module for module in adapted_layers(model, name) if module._site.path not in unused]
    if not adapted:
        raise Unsupported(
            "this adapter changes no layer by a method, so its method is not known here",
            where=name,
            remedy="keep the pack that it came from",
        )
    # Nested wrappers come outermost first, the last one added; list their sites in the model's order instead.
    order = path_order(model)
    adapted.sort(key=lambda module: order.get(module._site.path, len(order)))
    method = min((module._held[name] for module in adapted), key=lambda held: held.secondary).method
    sites_by_method: dict[str, dict[Site, tuple[Any, dict[str, np.ndarray]]]] = {method.name: {}}
    methods: dict[str, Method] = {}
    for module in adapted:
        held = module._held[name]
        methods[held.method.name] = held.method
        part, to_stored = (held.config, module._params(name)), held.method.storage.to_stored
        sites_by_method.setdefault(held.method.name, {})[module._site] = (
            part if to_stored is None else to_stored(*part, module._site)
        )
    shared = {key: as_numpy(value) for module in adapted for key, value in module._shared(name).items()}
    secondary = [
        MethodSites(methods[name], sites) for name, sites in sites_by_method.items() if name != method.name
    ]
    full = {
        module._site.path: module._params(name)
        for module in wrappers_of(model, name)
        if isinstance(module, SavedModule)
    }
    return Parts(method, sites_by_method[method.name], secondary, shared, full)
