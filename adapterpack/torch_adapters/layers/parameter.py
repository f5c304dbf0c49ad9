"""Wraps modules that own bare parameters, such as attention or fused experts, to adapt those parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ...adapter_methods import Site, fold, from_matrix, is_stacked, to_matrix
from ...errors import Unsupported
from .layer import Adapted, NewAdapter, Place
from .weights import require_in_memory, weight_of
from .wrapper import innermost


class AdaptedParameter(Adapted):
    """A module that is called with an adapted value of one of its frozen parameters; the parameter itself
    stays in place.

    A module with several adapted parameters has one wrapper for each, nested; the outermost makes the call
    with all values. Values are rounded to the parameter's precision, as merging the adapter would. In a stack
    of matrices, each has adapter parameters of its own.
    """

    _several = True
    _whole_batch = "it changes a parameter, which has one value for all rows"

    def __init__(self, base: nn.Module, site: Site) -> None:
        super().__init__(base, site)
        self._leaf = leaf_of(innermost(base), site.path)

    @property
    def _stored(self) -> tuple[Tensor, None]:
        """The frozen parameter, and no bias: what may act as its bias is not part of the site."""
        owner, _, leaf = self._leaf.rpartition(".")
        return weight_of(innermost(self).get_submodule(owner), leaf, self._site), None

    def _add(self, name: str, adapter: NewAdapter) -> None:
        """Adds an adapter; refuses dropout, which needs an input to act on."""
        require_in_memory(innermost(self), self._site.path)
        if adapter.config.dropout:
            raise Unsupported(
                "a parameter is changed in itself, where dropout on the input has no place",
                where=self._site.path,
                found=f"dropout {adapter.config.dropout}",
                remedy="set dropout to 0",
            )
        super()._add(name, adapter)

    def _folded_parameters(self) -> list[Place]:
        owner, _, leaf = self._leaf.rpartition(".")
        return [(innermost(self).get_submodule(owner), leaf)]

    def _merge_weights(self) -> dict[Place, Tensor]:
        (place,) = self._folded_parameters()
        with torch.no_grad():
            return {place: self._change(self._active).contiguous()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the module's output with the active adapters applied to its parameters."""
        changed = {}
        module: nn.Module = self
        # Collect the values of all nested wrappers, then call the innermost module once with all of them.
        while isinstance(module, AdaptedParameter):
            if module._active:
                changed[module._leaf] = module._change(module._active)
            module = module._base
        return functional_call(module, changed, args, kwargs) if changed else module(*args, **kwargs)

    def _change(self, names: tuple[str, ...]) -> Tensor:
        """Returns the parameter with the adapters ``names`` applied."""
        parameter, _ = self._stored
        weight = to_matrix(self._site.kind, parameter.detach())
        for name in names:
            weight = self._weigh(name, weight, self._fold(name, weight))
        return from_matrix(self._site.kind, weight, parameter.shape).to(parameter.dtype)

    def _fold(self, name: str, weight: Tensor) -> Tensor:
        """Applies one adapter to the parameter, matrix by matrix in a stack."""
        held = self._held[name]
        dtype = self._precision(name, weight.dtype)
        every = self._tensors(name, dtype)
        frozen = self._with_weight(dtype).weight

        def folded(matrix: Tensor, original: Tensor, params: dict[str, Tensor]) -> Tensor:
            """Applies the adapter to one matrix."""
            site = (
                dataclasses.replace(self._site, weight=original)
                if held.method.traits.reads_weight
                else self._site
            )
            changed, bias = fold(held.method, held.config, {**every, **params}, site, matrix, None)
            if bias is not None:
                raise Unsupported(
                    f"the method {held.method.name} gives this parameter a bias, and it has none",
                    where=self._site.path,
                )
            return changed

        site_params = {key: every[key] for key, _ in self._part(name).named_parameters()}
        run = vmap(folded) if is_stacked(self._site.kind) else folded
        return run(weight.to(dtype), frozen, site_params)


def leaf_of(module: nn.Module, path: str) -> str:
    """Returns the name of a parameter inside ``module``: the end of the parameter's ``path`` in the model,
    which leads through the module.

    Example:
        >>> leaf_of(nn.MultiheadAttention(4, 1), "layers.0.attention.out_proj.weight")
        'out_proj.weight'
    """
    names = {name for name, _ in module.named_parameters()}
    parts = path.split(".")
    return next(rest for start in range(len(parts)) if (rest := ".".join(parts[start:])) in names)
