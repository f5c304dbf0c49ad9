"""The two modules that adapters live in: one for every weight method, one for modules that are trained whole."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..errors import SiteNotFound, Unsupported, nearest
from ..methods import Method, Site, evaluate, frozen, run, to_matrix
from ..pack.safetensors import FLOATS, dtype_name
from . import kernels

Tensors = Mapping[str, nn.Parameter]


class Wrapper(nn.Module):
    """What stands in a module's place and holds named adapters for it; with none active it is the module itself, exactly."""

    active: tuple[str, ...]

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.training = base.training
        self.base = base
        self.active = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they came."""
        raise NotImplementedError

    def part(self, name: str) -> nn.Module:
        """What holds the adapter's parameters."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Removes an adapter; unknown names are ignored."""
        raise NotImplementedError

    def params(self, name: str) -> dict[str, np.ndarray]:
        """The adapter's own parameters as numpy arrays: floats as float32, the rest as it is."""
        return {key: as_numpy(value) for key, value in self.part(name).named_parameters()}

    def __getattr__(self, name: str) -> Any:
        """What the wrapped module has and this one has not (``in_features``, ...) is read from it: models look at such things."""
        own = self.__dict__.get("_modules", {})
        if name in own:  # asked for at every step: the shortest way
            return own[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)


class Adapted(Wrapper):
    """A wrapper whose adapters are those of a method at a site: their own parameters, the shared ones, and the constants."""

    several = False
    """Whether a module may stand in several wrappers of this class, one for each of its sites."""

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__(base)
        self.site = site
        self.adapters = nn.ModuleDict()
        self.common = nn.ModuleDict()
        self.fixed = nn.ModuleDict()
        self.methods: dict[str, tuple[Method, Any]] = {}
        self.beside: set[str] = set()  # the adapters whose method here is not the one that they are named by
        self.given: dict[str, Mapping[str, torch.Tensor]] = {}
        self.where: dict[str, Callable[[], torch.Tensor]] = {}

    def add(self, name: str, method: Method, cfg: Any, params: Mapping[str, np.ndarray], constants: Tensors, shared: Tensors) -> None:
        """Adds an adapter; its own parameters are trained as float32, on the base's device, unless the method says that they are frozen.

        ``constants`` and ``shared`` may belong to other sites, too.
        """
        device = next(self.base.parameters()).device
        self.adapters[_key(name)] = nn.ParameterDict({key: as_parameter(value, device) for key, value in params.items()})
        self.common[_key(name)] = nn.ParameterDict(dict(shared))
        self.fixed[_key(name)] = nn.ParameterDict(dict(constants))
        self.methods[name] = (method, cfg)
        self.trainable(name)

    def trainable(self, name: str, yes: bool = True) -> None:
        """Lets the adapter's parameters be trained, or not."""
        kept = frozen(*self.methods[name])
        for part in (self.adapters[_key(name)], self.common[_key(name)]):
            for key, value in part.items():
                value.requires_grad_(yes and value.is_floating_point() and key not in kept)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they came."""
        return tuple(self.methods)

    def part(self, name: str) -> nn.Module:
        """What holds the adapter's own parameters."""
        return self.adapters[_key(name)]

    def shared(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters that the adapter has in common at all its sites."""
        return dict(self.common[_key(name)].items())

    def remove(self, name: str) -> None:
        """Removes an adapter; unknown names are ignored."""
        if name in self.methods:
            del self.adapters[_key(name)], self.common[_key(name)], self.fixed[_key(name)], self.methods[name]
            self.beside.discard(name)
            self.given.pop(name, None)
            self.where.pop(name, None)
            self.active = tuple(other for other in self.active if other != name)

    def exclusive(self, name: str) -> bool:
        """Whether no other adapter of such a method may be active beside this one."""
        return self.methods[name][0].traits.exclusive

    @property
    def stored(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The frozen weight as the module stores it, and its bias."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        return weight, getattr(self.base, "bias", None)

    def tensors(self, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """As :meth:`every`, floats in ``dtype``."""
        return {leaf: value.to(dtype) if value.is_floating_point() else value for leaf, value in self.every(name).items()}

    def every(self, name: str) -> dict[str, torch.Tensor]:
        """Everything that the method's functions want of the adapter: its own parameters, the shared ones, the constants, and what a first
        pass of the model gave for this one."""
        key = _key(name)
        own = {leaf: value for part in (self.adapters, self.common, self.fixed) for leaf, value in part[key].items()}
        return {**own, **self.given[name]} if name in self.given else own

    def _own(self, name: str) -> Iterator[torch.Tensor]:
        return iter((*self.part(name).parameters(), *self.shared(name).values()))

    def _with_weight(self, dtype: torch.dtype) -> Site:
        """The site with the frozen weight and bias, which pass no gradient on."""
        stored, bias = self.stored
        weight = to_matrix(self.site.kind, stored.detach()).to(dtype)
        return dataclasses.replace(self.site, weight=weight, base_bias=None if bias is None else bias.detach().to(dtype))


class AdaptedLayer(Adapted):
    """A frozen layer with any number of named adapters of weight methods.

    Input and output are those of the wrapped layer. Several active adapters apply one after the other, in order.
    """

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight; some models look at its dtype."""
        return self.stored[0]

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias, or None."""
        return self.stored[1]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output with the active adapters applied."""
        result: Any = None
        for position, name in enumerate(self.active):
            before = (lambda value: self.base(value, *args, **kwargs)) if position == 0 else result
            result = self._applied(name, before, position == 0 and not args and not kwargs)
        return self.base(x, *args, **kwargs) if result is None else result(x)

    def _applied(self, name: str, before: Any, first: bool) -> Any:
        """The adapter on top of ``before``, which is the wrapped layer if it comes ``first``."""
        method, cfg = self.methods[name]

        def forward(x: torch.Tensor) -> torch.Tensor:
            autocast = torch.is_autocast_enabled(x.device.type)
            every = self.every(name)
            own = next(value.dtype for value in every.values() if value.is_floating_point())
            # The branch is computed in the adapter's precision, or the input's where that is finer: nothing of the base is rounded away.
            dtype = torch.promote_types(x.dtype, own)
            tensors = {leaf: value.to(dtype) if value.is_floating_point() else value for leaf, value in every.items()}
            drop = (lambda value: functional.dropout(value, cfg.dropout)) if self.training and cfg.dropout else None
            result = x.dtype

            def base(value: torch.Tensor) -> torch.Tensor:
                nonlocal result
                output: torch.Tensor = before(value.to(x.dtype))
                result = output.dtype  # under autocast it is not that of the input, and the layer's neighbours count on it
                return output

            inner = x if autocast else x.to(dtype)
            site = self._with_weight(dtype) if method.traits.reads_weight else self.site
            form = None if method.forward is not None else method.attach(cfg, tensors, site)
            # Autocast rules do not reach the backward of a custom function, so the kernels stay out of its way.
            quick = form is not None and not autocast
            layer = self._bare(dtype) if quick and first and x.dtype == dtype and name not in self.where else None
            if form is not None and layer is not None:
                y = kernels.fused(form, layer, x, drop(x) if drop else None)
                if y is not None:
                    return y.to(result)
            quick = form is not None and quick and not drop and kernels.is_low_rank(form)

            def adapted(ask: Any, seen: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
                if form is None:
                    return run(method, cfg, tensors, site, ask, inner, drop)
                return kernels.add_low_rank(form, ask(seen), seen) if quick else evaluate(form, ask, inner, drop)

            if name not in self.where:
                return adapted(base, x, inner).to(result)
            mask, plain = self.where[name](), base(x)
            if form is not None and form.is_branch:  # which adds nothing where it is given nothing
                seen = placed(mask, x, torch.zeros_like(x), self.site)
                return adapted(lambda _: plain, seen, seen if autocast else seen.to(dtype)).to(result)
            changed = adapted(lambda value: plain if value is inner else base(value), x, inner)
            return placed(mask, changed.to(result), plain, self.site)

        return forward

    def _bare(self, dtype: torch.dtype) -> kernels.Frozen | None:
        """The wrapped layer's weight and bias, if they are frozen and of ``dtype`` and calling the layer comes to nothing else.

        It does not where something hooks into the call or took its place (offloading, sharding), or the weight is of a class of its own.
        """
        base: Any = self.base
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        if f"{type(base).__module__}.{type(base).__qualname__}" not in _PLAIN_LAYERS or hooked or "forward" in base.__dict__:
            return None
        held = [value for value in (base.weight, base.bias) if value is not None]
        plain = all(type(value) in _PLAIN and value.dtype == dtype and not value.requires_grad for value in held)
        return kernels.Frozen(to_matrix(self.site.kind, base.weight), base.bias) if plain else None


_PLAIN = (nn.Parameter, torch.Tensor)
_PLAIN_LAYERS = frozenset({"torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"})
"""Classes whose call is ``x W^T + b``, of a library that need not be there by name."""


def placed(mask: torch.Tensor, changed: torch.Tensor, plain: torch.Tensor, site: Site) -> torch.Tensor:
    """``changed`` where ``mask`` ``[batch, length]`` says so, else ``plain``; both ``[batch, length, ...]`` or ``[batch * length, ...]``.

    Virtual tokens, which stand before a row's own, are left alone.

    Raises:
        Unsupported: the layer does not see the rows as they are.
    """
    if changed.ndim > 2 and len(changed) == len(mask) and changed.shape[1] > mask.shape[1]:
        mask = functional.pad(mask, (changed.shape[1] - mask.shape[1], 0))
    rows = mask if changed.ndim > 2 else mask.reshape(-1)
    if changed.shape[: rows.ndim] != rows.shape:
        raise Unsupported("this layer does not see one vector for each token, so its adapter cannot act at some of them only",
                          where=site.path, expected=(*mask.shape, changed.shape[-1]), found=tuple(changed.shape),
                          remedy="leave it out of the targets")
    return torch.where(rows[(..., *(None,) * (changed.ndim - rows.ndim))], changed, plain)


class SavedModule(Wrapper):
    """A module with whole trained copies by name; with none active it is the original. ``labels`` says what a copy's outputs mean."""

    def __init__(self, base: nn.Module, path: str) -> None:
        super().__init__(base)
        self.path = path
        self.copies = nn.ModuleDict()
        self.labels: dict[str, tuple[str, ...] | None] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the copies, in the order in which they came."""
        return tuple(self.labels)

    def add(self, name: str, params: Mapping[str, np.ndarray] | None = None, labels: tuple[str, ...] | None = None) -> None:
        """Adds a trainable float32 copy; ``params`` replaces its parameters, in shape too (a head with other labels).

        Raises:
            SiteNotFound: the module has no parameter of that name.
        """
        twin = _bare(copy.deepcopy(self.base)).float().requires_grad_(True)
        own = dict(twin.named_parameters())
        for key, value in (params or {}).items():
            if key not in own:
                raise SiteNotFound("the module has no such parameter", where=self.path, found=key, remedy=nearest(key, own))
            owner, _, leaf = key.rpartition(".")
            holder = twin.get_submodule(owner)
            setattr(holder, leaf, nn.Parameter(torch.from_numpy(np.array(value, np.float32)).to(own[key].device)))
            if isinstance(holder, nn.Linear):
                holder.out_features, holder.in_features = holder.weight.shape
        self.copies[_key(name)] = twin
        self.labels[name] = labels

    def part(self, name: str) -> nn.Module:
        """The copy of that name."""
        return self.copies[_key(name)]

    def trainable(self, name: str, yes: bool = True) -> None:
        """Lets the copy be trained, or not."""
        self.part(name).requires_grad_(yes)

    def remove(self, name: str) -> None:
        """Removes a copy; unknown names are ignored."""
        if name in self.labels:
            del self.copies[_key(name)], self.labels[name]
            self.active = tuple(other for other in self.active if other != name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output of the last active copy, or of the original; in the original's precision."""
        if not self.active:
            return self.base(x, *args, **kwargs)
        output = self.copies[_key(self.active[-1])](x.float() if x.is_floating_point() else x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type) or not isinstance(output, torch.Tensor):
            return output
        own = next(self.base.parameters(), x)
        return output.to(x.dtype if x.is_floating_point() else own.dtype)  # an embedding takes ids


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules under their own paths, as if nothing had been put into it; a shared module once."""
    return ((path, module) for path, _, module in _walk(model, "", set()))


def module_at(model: nn.Module, path: str) -> nn.Module:
    """What stands at one of the model's own paths: the module itself, or what wraps it.

    Raises:
        AttributeError: there is no such path.
    """
    module = model
    for leaf in filter(None, path.split(".")):
        module = getattr(innermost(module), leaf)
    return module


def _walk(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    own = innermost(module)
    if own not in seen:
        seen.add(own)
        yield path, module, own
        for leaf, child in own.named_children():
            yield from _walk(child, f"{path}.{leaf}" if path else leaf, seen)


def innermost(module: nn.Module) -> nn.Module:
    """The model's own module under whatever wraps it."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def _bare(module: nn.Module) -> nn.Module:
    """The module without anything that was put into it or around it."""
    module = innermost(module)
    for leaf, child in list(module.named_children()):
        if (own := _bare(child)) is not child:
            setattr(module, leaf, own)
    return module


def as_numpy(value: torch.Tensor) -> np.ndarray:
    """A tensor as a numpy array: floats as float32, the rest as it is."""
    array: np.ndarray = (value.detach().float() if value.is_floating_point() else value.detach()).cpu().numpy()
    return array


def as_parameter(value: np.ndarray, device: torch.device) -> nn.Parameter:
    """A numpy array as a parameter that is not trained yet: floats as float32, the rest as it is."""
    wide = np.array(value, np.float32 if dtype_name(value.dtype) in FLOATS else value.dtype)
    return nn.Parameter(torch.from_numpy(wide).to(device), requires_grad=False)


@lru_cache(maxsize=1024)
def _key(name: str) -> str:
    """A name as the key of a ModuleDict, which may hold no dots and none of the dict's own words (``keys``, ``train``)."""
    return "adapter:" + name.replace("%", "%25").replace(".", "%2e")
