"""The two modules that adapters live in: one for every weight method, one for modules that are trained whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..methods import Method, Site, evaluate, run
from . import kernels


class AdaptedLayer(nn.Module):
    """A frozen layer with any number of named adapters; with none active it is the layer itself, exactly.

    Input and output are those of the wrapped layer. Several active adapters apply one after the other, in order.
    """

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.adapters = nn.ModuleDict()
        self.methods: dict[str, tuple[Method, Any]] = {}
        self.active: tuple[str, ...] = ()

    def add(self, name: str, method: Method, cfg: Any, params: Mapping[str, np.ndarray]) -> None:
        """Adds an adapter whose parameters are ``params``, as float32 on the base layer's device."""
        device = next(self.base.parameters()).device
        tensors = {key: nn.Parameter(torch.from_numpy(np.array(value, np.float32)).to(device)) for key, value in params.items()}
        self.adapters[_key(name)] = nn.ParameterDict(tensors)
        self.methods[name] = (method, cfg)

    def remove(self, name: str) -> None:
        """Removes an adapter; unknown names are ignored."""
        if name in self.methods:
            del self.adapters[_key(name)], self.methods[name]
            self.active = tuple(other for other in self.active if other != name)

    def params(self, name: str) -> dict[str, np.ndarray]:
        """The adapter's parameters as numpy arrays."""
        return {key: value.detach().float().cpu().numpy() for key, value in self.adapters[_key(name)].items()}

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight; some models look at its dtype."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias, or None."""
        bias: torch.Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output with the active adapters applied."""
        result: Any = None
        for position, name in enumerate(self.active):
            before = (lambda value: self.base(value, *args, **kwargs)) if position == 0 else result
            result = self._applied(name, before)
        return self.base(x, *args, **kwargs) if result is None else result(x)

    def _applied(self, name: str, before: Any) -> Any:
        method, cfg = self.methods[name]
        tensors = self.adapters[_key(name)]

        def forward(x: torch.Tensor) -> torch.Tensor:
            autocast = torch.is_autocast_enabled(x.device.type)
            inner = x if autocast else x.to(next(iter(tensors.values())).dtype)
            drop = (lambda value: functional.dropout(value, cfg.dropout)) if self.training and cfg.dropout else None

            def base(value: torch.Tensor) -> torch.Tensor:
                output: torch.Tensor = before(value.to(x.dtype))
                return output

            if method.forward is not None:
                return run(method, cfg, tensors, self.site, base, inner, drop).to(x.dtype)
            form = method.attach(cfg, tensors, self.site)
            # Autocast rules do not reach the backward of a custom function, so the kernel stays out of its way.
            quick = None if drop or autocast else kernels.branch(form, inner)
            y: torch.Tensor = evaluate(form, base, inner, drop) if quick is None else base(inner) + quick
            return y.to(x.dtype)

        return forward


class SavedModule(nn.Module):
    """A module with whole trained copies by name; with none active it is the original."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.copies = nn.ModuleDict()
        self.active: tuple[str, ...] = ()

    def add(self, name: str, params: Mapping[str, np.ndarray] | None = None) -> None:
        """Adds a trainable float32 copy; ``params`` replaces its parameters, in shape too (a head with other labels)."""
        twin = copy.deepcopy(self.base).float().requires_grad_(True)
        for key, value in (params or {}).items():
            owner, _, leaf = key.rpartition(".")
            device = next(self.base.parameters()).device
            setattr(twin.get_submodule(owner), leaf, nn.Parameter(torch.from_numpy(np.array(value, np.float32)).to(device)))
        self.copies[_key(name)] = twin

    def has(self, name: str) -> bool:
        """Whether there is a copy of that name."""
        return _key(name) in self.copies

    def remove(self, name: str) -> None:
        """Removes a copy; unknown names are ignored."""
        if self.has(name):
            del self.copies[_key(name)]
            self.active = tuple(other for other in self.active if other != name)

    def params(self, name: str) -> dict[str, np.ndarray]:
        """The copy's parameters as numpy arrays."""
        return {key: value.detach().float().cpu().numpy() for key, value in self.copies[_key(name)].named_parameters()}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output of the last active copy, or of the original."""
        if not self.active:
            return self.base(x, *args, **kwargs)
        return self.copies[_key(self.active[-1])](x.float(), *args, **kwargs).to(x.dtype)


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules under their own paths, as if nothing had been put into it."""
    wrapped: set[str] = set()
    for path, module in model.named_modules():
        parts = path.split(".")
        if any(".".join(parts[:end]) in wrapped for end in range(1, len(parts))):
            continue
        if isinstance(module, AdaptedLayer | SavedModule):
            wrapped.add(path)
            yield path, module.base
        else:
            yield path, module


def _key(name: str) -> str:
    """Module names may not hold dots."""
    return name.replace(".", "%2e")
