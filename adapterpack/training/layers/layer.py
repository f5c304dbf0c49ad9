"""The modules that hold adapters of weight methods around a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ...adapter_methods import Method, Site, evaluate, frozen, run, to_matrix
from ...errors import Unsupported
from ..kernels import low_rank
from ..kernels.dropout import Dropout
from .tensors import as_parameter
from .weights import device_of, tensor_of, weight_of
from .wrapper import Wrapper, child, innermost, key_of

Tensors = Mapping[str, nn.Parameter]


class Adapted(Wrapper):
    """A wrapper whose adapters are those of a method at a site: their own parameters, the shared ones, and the constants."""

    _several = False
    """Whether a module may stand in several wrappers of this class, one for each of its sites."""
    _adapters: nn.ModuleDict = child("adapters")
    _common: nn.ModuleDict = child("common")
    _fixed: nn.ModuleDict = child("fixed")

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__(base)
        self._site = site
        self._modules.update({key: nn.ModuleDict() for key in ("adapters", "common", "fixed")})
        self._methods: dict[str, tuple[Method, Any]] = {}
        self._secondary: set[str] = set()  # the adapters whose method here is not the one that they are named by
        self._first_pass_params: dict[str, Mapping[str, torch.Tensor]] = {}
        self._where: dict[str, Callable[[], torch.Tensor]] = {}

    def _add(self, name: str, method: Method, cfg: Any, params: Mapping[str, np.ndarray], constants: Tensors, shared: Tensors) -> None:
        """Adds an adapter; its own parameters are trained as float32, on the base's device, unless the method says that they are frozen.

        ``constants`` and ``shared`` may belong to other sites, too.
        """
        device = device_of(self._base, self._site.path)
        self._adapters[key_of(name)] = nn.ParameterDict({key: as_parameter(value, device) for key, value in params.items()})
        self._common[key_of(name)] = nn.ParameterDict(dict(shared))
        self._fixed[key_of(name)] = nn.ParameterDict(dict(constants))
        self._methods[name] = (method, cfg)
        self._trainable(name)

    def _trainable(self, name: str, yes: bool = True) -> None:
        """Lets the adapter's parameters be trained, or not."""
        kept = frozen(*self._methods[name])
        for part in (self._adapters[key_of(name)], self._common[key_of(name)]):
            for key, value in part.items():
                value.requires_grad_(yes and value.is_floating_point() and key not in kept)

    @property
    def _names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they came."""
        return tuple(self._methods)

    def _part(self, name: str) -> nn.Module:
        """What holds the adapter's own parameters."""
        return self._adapters[key_of(name)]

    def _shared(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters that the adapter has in common at all its sites."""
        return dict(self._common[key_of(name)].items())

    def _remove(self, name: str) -> None:
        """Removes an adapter; unknown names are ignored."""
        if name in self._methods:
            del self._adapters[key_of(name)], self._common[key_of(name)], self._fixed[key_of(name)], self._methods[name]
            self._secondary.discard(name)
            self._first_pass_params.pop(name, None)
            self._where.pop(name, None)
            self._active = tuple(active for active in self._active if active != name)

    def _exclusive(self, name: str) -> bool:
        """Whether no other adapter of such a method may be active at the same time."""
        return self._methods[name][0].traits.exclusive

    @property
    def _stored(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The frozen weight in the shape in which the module stores it, and its bias; as floats, see :func:`~.weights.weight_of`."""
        module = innermost(self)
        return weight_of(module, "weight", self._site), tensor_of(module, "bias", self._site.path)

    def _tensors(self, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """As :meth:`_every`, floats in ``dtype``."""
        return {leaf: value.to(dtype) if value.is_floating_point() else value for leaf, value in self._every(name).items()}

    def _every(self, name: str) -> dict[str, torch.Tensor]:
        """Everything that the method's functions want of the adapter: its own parameters, the shared ones, the constants, and what a first
        pass of the model gave for this one."""
        key = key_of(name)
        tensors = {leaf: value for part in (self._adapters, self._common, self._fixed) for leaf, value in part[key].items()}
        if any(value.is_meta for value in tensors.values()):
            raise Unsupported("the adapter's own tensors are not in memory", where=f"{self._site.path}, '{name}'", found="the meta device",
                              remedy="let accelerate offload the base first, and put the adapter into it then")
        return {**tensors, **self._first_pass_params[name]} if name in self._first_pass_params else tensors

    def _all_params(self, name: str) -> Iterator[torch.Tensor]:
        return iter((*self._part(name).parameters(), *self._shared(name).values()))

    def _with_weight(self, dtype: torch.dtype) -> Site:
        """The site with the frozen weight and bias, which pass no gradient on."""
        weight_as_stored, bias = self._stored
        weight = to_matrix(self._site.kind, weight_as_stored.detach()).to(dtype)
        return dataclasses.replace(self._site, weight=weight, base_bias=None if bias is None else bias.detach().to(dtype))


class AdaptedLayer(Adapted):
    """A frozen layer with any number of named adapters of weight methods.

    Input and output are those of the wrapped layer. Several active adapters apply one after the other, in order.
    """

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output with the active adapters applied."""
        if not self._active:
            return self._base(*args, **kwargs)  # type: ignore[no-any-return]
        x, result = self._entered(args, kwargs)
        for position, name in enumerate(self._active):
            result = self._applied(name, result, position == 0 and len(args) + len(kwargs) == 1)
        return result(x)  # type: ignore[no-any-return]

    def _applied(self, name: str, before: Any, first: bool) -> Any:
        """The adapter on top of ``before``, which is the wrapped layer if it comes ``first``."""
        method, cfg = self._methods[name]

        def forward(x: torch.Tensor) -> torch.Tensor:
            autocast = torch.is_autocast_enabled(x.device.type)
            every = self._every(name)
            own_dtype = next(value.dtype for value in every.values() if value.is_floating_point())
            # The branch is computed in the adapter's precision, or the input's where that is finer: nothing of the base is rounded away.
            dtype = torch.promote_types(x.dtype, own_dtype)
            tensors = {leaf: value.to(dtype) if value.is_floating_point() else value for leaf, value in every.items()}
            drop = (lambda value: functional.dropout(value, cfg.dropout)) if self.training and cfg.dropout else None
            result = x.dtype

            def base(value: torch.Tensor) -> torch.Tensor:
                nonlocal result
                output: torch.Tensor = before(value.to(x.dtype))
                result = output.dtype  # under autocast it is not that of the input, and the layer's neighbours count on it
                return output

            inner = x if autocast else x.to(dtype)
            site = self._with_weight(dtype) if method.traits.reads_weight else self._site
            form = None if method.forward is not None else method.normal_form(cfg, tensors, site)
            # Autocast rules do not reach the backward of a custom function, so the kernels stay out of its way.
            # A compiler makes dropout again by itself, and cannot look at a seed.
            quick = form is not None and not autocast and not (drop and torch.compiler.is_compiling())
            layer = self._bare(dtype) if quick and first and x.dtype == dtype and name not in self._where else None
            if form is not None and layer is not None:
                y = low_rank.fused(form, layer, x, Dropout.drawn(cfg.dropout) if drop else None)
                if y is not None:
                    return y.to(result)
            quick = form is not None and quick and low_rank.is_low_rank(form)

            def adapted(ask: Any, visible: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
                if form is None:
                    return run(method, cfg, tensors, site, ask, inner, drop)
                if quick:
                    return low_rank.add_low_rank(form, ask(visible), visible, Dropout.drawn(cfg.dropout) if drop else None)
                return evaluate(form, ask, inner, drop)

            if name not in self._where:
                return adapted(base, x, inner).to(result)
            mask, plain = self._where[name](), base(x)
            if form is not None and form.is_branch:  # which adds nothing where it is given nothing
                visible = placed(mask, x, torch.zeros_like(x), self._site)
                return adapted(lambda _: plain, visible, visible if autocast else visible.to(dtype)).to(result)
            changed = adapted(lambda value: plain if value is inner else base(value), x, inner)
            return placed(mask, changed.to(result), plain, self._site)

        return forward

    def _bare(self, dtype: torch.dtype) -> low_rank.Frozen | None:
        """The wrapped layer's weight and bias, if they are frozen and of ``dtype`` and calling the layer comes to nothing else.

        It does not where something hooks into the call or took its place (offloading, sharding), or the weight is of a class of its own.
        """
        base: Any = self._base
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        if f"{type(base).__module__}.{type(base).__qualname__}" not in _PLAIN_LAYERS or hooked or "forward" in base.__dict__:
            return None
        tensors = [value for value in (base.weight, base.bias) if value is not None]
        plain = all(type(value) in _PLAIN and value.dtype == dtype and not value.requires_grad for value in tensors)
        return low_rank.Frozen(to_matrix(self._site.kind, base.weight), base.bias) if plain else None


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
