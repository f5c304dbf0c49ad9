"""Builds the wrappers of a new adapter outside the model, and puts all of them into it at once.

An adapter may have hundreds of sites, and any of them may turn out to be impossible. Only when all wrappers
exist does :func:`swap` change the model, so that a failure leaves it untouched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..adapter_methods import LAYOUTS, Method, Site, Tensors, constants_of, to_matrix, unfoldable
from ..errors import Unsupported
from ..manifest import Group
from .adapter_kinds import KINDS
from .layers import (
    Adapted,
    AdaptedParameter,
    AdaptedTable,
    SavedModule,
    Wrapper,
    as_numpy,
    device_of,
    innermost,
    module_at,
    stop_observing,
    tensor_of,
)
from .layers.layer import NewAdapter
from .layers.position_tracking import tell
from .layers.tensors import as_parameter


class Work:
    """Collects the wrappers of one adapter; :func:`wrapping` puts them into the model.

    ``swaps`` maps each module to the wrapper that replaces it, ``touched`` lists all wrappers that hold the
    new adapter, existing ones included.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self._begun: dict[str, Tensors] = {}
        self._shared: dict[str, dict[str, nn.Parameter]] = {}
        self.swaps: dict[nn.Module, nn.Module] = {}
        self.touched: list[Adapted | SavedModule] = []
        self._constants: dict[int, tuple[np.ndarray, nn.Parameter]] = {}

    def share(self, method: Method, shared: Tensors) -> None:
        """Sets the parameters that all sites of a method share; call it before the method's first
        :meth:`adapter`.
        """
        device = device_of(self.model) if shared else torch.device("cpu")
        self._begun[method.name] = shared
        self._shared[method.name] = {key: as_parameter(value, device) for key, value in shared.items()}

    def adapter(
        self,
        path: str,
        method: Method,
        cfg: Any,
        params: Callable[[Site], Tensors],
        weight: bool = False,
        secondary: bool = False,
        kind: str = "",
    ) -> Adapted:
        """Adds the new adapter to the wrapper at a site, and returns that.

        ``params`` returns the parameters for a site, which includes the base's weight if ``weight`` or if the
        method reads it. ``secondary`` means that ``method`` is not the adapter's main method. ``kind`` is the
        kind of the site in the adapter's pack.
        """
        wrapper = self._wrapper(path, method, kind)
        self.touched.append(wrapper)
        site = _with_weight(wrapper) if weight or method.traits.reads_weight else wrapper._site
        site_params = params(site)
        constant_arrays = constants_of(method, cfg, {**self._begun.get(method.name, {}), **site_params}, site)
        device = device_of(wrapper._base, path)
        constants = {key: self._constant(value, device) for key, value in constant_arrays.items()}
        shared = self._shared.get(method.name, {})
        wrapper._add(self.name, NewAdapter(method, cfg, site_params, constants, shared))
        if secondary:
            wrapper._held[self.name].secondary = True
        return wrapper

    def site_with_weight(self, path: str, method: Method) -> Site:
        """Returns a site with its weight and bias in float32."""
        return _with_weight(self._wrapper(path, method))

    def shape_of(self, group: Group, method: Method) -> tuple[int, ...]:
        """Returns the shape of the weight at a group's site, with its kernel; a width that the pack states
        stays, so that it can be compared with the layer's.
        """
        return shape_at(group, self._wrapper(group.path, method, group.kind)._site)

    def _constant(self, value: np.ndarray, device: torch.device) -> nn.Parameter:
        """Returns a constant as a parameter; sites that pass the same array share one."""
        if id(value) not in self._constants:
            self._constants[id(value)] = value, as_parameter(value, device)
        return self._constants[id(value)][1]

    def _wrapper(self, path: str, method: Method, site_kind: str = "") -> Adapted:
        """Returns the wrapper for adapters of the method at ``path``: an existing one that fits, else a new
        one.

        A layer is taken as a kind whose weight can hold the change, unless a pack says otherwise by
        ``site_kind``.
        """
        kind = KINDS[method.kind]
        wanted = (site_kind,) if unfoldable(site_kind) else ()
        traits = dataclasses.replace(
            method.traits, layers=wanted or tuple(one for one in method.traits.layers if not unfoldable(one))
        )
        outer = kind.at(self.model, path)
        if outer is self.model:
            raise Unsupported(
                "the model itself owns this parameter, and cannot be replaced inside itself",
                where=path,
                remedy="put the model into a container, such as nn.Sequential",
            )
        # From the outermost wrapper in to the module itself. Where another adapter trained the module in
        # full, that copy's wrapper stays outermost.
        chain = [outer._base if isinstance(outer, SavedModule) else outer]
        while isinstance(chain[-1], Wrapper):
            chain.append(chain[-1]._base)
        # Follow the replacements that are planned but not yet made, so that a second wrapper goes around the
        # first.
        module = chain[0 if kind.outermost else -1]
        while module in self.swaps:
            module = self.swaps[module]
            chain.append(module)
        for existing in chain:
            if (
                isinstance(existing, Adapted)
                and isinstance(existing, kind.holder)
                and (existing._site.path == path or not existing._several)
            ):
                if existing._site.kind not in traits.layers and not is_linear(existing._site):
                    raise Unsupported(
                        "another adapter changes this layer in another way",
                        where=path,
                        found=existing._site.kind,
                        expected=", ".join(traits.layers),
                        remedy="detach it first",
                    )
                return existing
        wrapper = kind.wrap(self.model, module, path, traits)
        if any(
            isinstance(existing, AdaptedParameter) and not isinstance(wrapper, AdaptedParameter)
            for existing in chain
        ):
            raise Unsupported(
                "another adapter changes a parameter of this layer, whose value the layer would not see",
                where=path,
                found=wrapper._site.kind,
                remedy="detach it first",
            )
        self.swaps[module] = wrapper
        return wrapper

    def saved_module(self, path: str) -> SavedModule:
        """Returns the wrapper that holds copies of the module at ``path``, for training it in full."""
        module = module_at(self.model, path)
        if not isinstance(module, SavedModule):
            saved = SavedModule(module, path)
            self.swaps[module] = saved
            module = saved
        self.touched.append(module)
        return module


@contextmanager
def wrapping(model: nn.Module, name: str) -> Iterator[Work]:
    """Yields a :class:`Work` and puts its wrappers into the model when the block ends; after an error the
    model is unchanged.
    """
    work = Work(model, name)
    try:
        yield work
        layers = [module for module in work.touched if isinstance(module, Adapted)]
        if any(layer._held[name].config.acts is not None for layer in layers):
            tell(model, name, layers)
        _require_one_of_tied(model, work)
    except BaseException:
        for module in work.touched:
            module._remove(name)
        stop_observing(model, [name])
        raise
    swap(model, work.swaps)
    for wrapper in work.swaps.values():
        if isinstance(wrapper, AdaptedTable):
            for tied in _modules_tied_to(model, wrapper):
                wrapper._follow(tied)


def _require_one_of_tied(model: nn.Module, work: Work) -> None:
    """Raises if an adapter changes both an embedding that the output head follows and that head itself, by a
    change of the tied weight.
    """
    for table in (
        module for module in work.touched if isinstance(module, AdaptedTable) and work.name in module._names
    ):
        for tied in _modules_tied_to(model, table):
            for own in (
                module for module in work.touched if isinstance(module, Adapted) and innermost(module) is tied
            ):
                if all(module._held[work.name].method.traits.tied for module in (own, table)):
                    raise Unsupported(
                        "the embedding and the output head are one weight, and the adapter changes each "
                        "in its own way",
                        where=own._site.path,
                        found=f"{table._site.path} and {own._site.path}",
                        remedy="load the base untied, or train the embedding alone, which its head follows",
                    )


def _modules_tied_to(model: nn.Module, table: AdaptedTable) -> list[nn.Module]:
    """Returns the output head and other embeddings whose weight is this table."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = head._base if isinstance(head, Adapted) else head
    embeddings = [
        module for module in model.modules() if isinstance(module, nn.Embedding) and module is not table._base
    ]
    return [
        module for module in (head, *embeddings) if module is not None and _is_tied(module, innermost(table))
    ]


def _is_tied(module: nn.Module, table: nn.Module) -> bool:
    """Whether two modules share one weight. Offloading by accelerate gives each its own copy, so there the
    values are compared.
    """
    weight = getattr(module, "weight", None)
    table_weight = table.weight
    if (
        weight is None
        or weight is table_weight
        or weight.shape != table_weight.shape
        or not (weight.is_meta or table_weight.is_meta)
    ):
        return bool(weight is table_weight)
    return bool(
        torch.equal(*(tensor_of(owner, "weight", "the output head").to("cpu") for owner in (module, table)))
    )


def swap(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces modules wherever they occur in the model: a layer used in two places is replaced in both."""
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            new = child
            while new in swaps:
                new = swaps[new]
            if new is not child:
                parent._modules[leaf] = new
                if isinstance(parent, nn.TransformerEncoderLayer) and isinstance(new, Adapted):
                    new.register_forward_pre_hook(_mark_called)


def _mark_called(*_: Any) -> None:
    """Does nothing as a hook, but makes torch's fused encoder call its layers: without hooks it reads their
    weights directly and bypasses adapters.
    """


def shape_at(group: Group, site: Site) -> tuple[int, ...]:
    """Returns the shape of the weight at a group's site, with its kernel; a width that the group states
    stays.
    """
    return group.out_features or site.out_features, group.in_features or site.in_features, *site.kernel


def is_linear(site: Site) -> bool:
    """Whether a site is a linear layer, in whatever layout it stores its weight; an adapter fits all of these
    layouts.
    """
    return site.kind in LAYOUTS and LAYOUTS[site.kind].linear


def derive_constants(
    wrapper: Adapted, name: str, params: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns the constants that the adapter's method derives from stored parameters, for the values
    ``params``.
    """
    held = wrapper._held[name]
    assert "derive" in held.method.overrides
    made = held.method.overrides["derive"](
        held.config, {key: as_numpy(value) for key, value in params.items()}, _with_weight(wrapper)
    )
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in made.items()}


def _with_weight(wrapper: Adapted) -> Site:
    """Returns the wrapper's site with its weight and bias in float32."""
    stored, bias = wrapper._stored
    weight = to_matrix(wrapper._site.kind, as_numpy(stored))
    return dataclasses.replace(
        wrapper._site, weight=weight, base_bias=None if bias is None else as_numpy(bias)
    )
