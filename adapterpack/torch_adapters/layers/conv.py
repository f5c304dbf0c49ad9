"""Holds adapters of convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...adapter_methods import Method, from_matrix
from ...errors import Unsupported
from ..kernels import low_rank
from .layer import AdaptedLayer, NewAdapter

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution by its weight as it is: some classes normalise it, or pad in their
    own way.
    """
    return isinstance(module, CONVOLUTIONS) and any(
        type(module).forward is kind.forward for kind in CONVOLUTIONS
    )


_CONVOLVE: tuple[Callable[..., torch.Tensor], ...] = (
    nn.functional.conv1d,
    nn.functional.conv2d,
    nn.functional.conv3d,
)
"""By the number of the kernel's axes, less one."""


def _is_thin(method: Method) -> bool:
    """Whether all that a method does is a change of low rank, which the base has no part in."""
    traits = method.traits
    return (
        traits.additive
        and traits.low_rank
        and not traits.reads_weight
        and "forward" not in method.overrides
        and "fold" not in method.overrides
    )


class AdaptedConv(AdaptedLayer):
    """A frozen convolution with adapters: for a method a layer ``[out, in / groups * kernel]``; groups stay
    groups.

    A change of low rank is two narrow convolutions parallel to the base's. Any other is folded, and the
    layer's own convolution runs on the folded weight; where that would cost the change its precision, in half
    precision, or dropout is to act on the change alone, an additive change is a convolution of its own.
    """

    def _add(self, name: str, adapter: NewAdapter) -> None:
        if adapter.config.dropout and not adapter.method.traits.additive:
            raise Unsupported(
                f"the method {adapter.method.name} changes a convolution in its weight, where dropout on the "
                "input has no place",
                where=self._site.path,
                found=f"dropout {adapter.config.dropout}",
                remedy="set dropout to 0",
            )
        super()._add(name, adapter)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The convolution's output with the active adapters applied."""
        if not self._active:
            return self._base(*args, **kwargs)  # type: ignore[no-any-return]
        x, base = self._enter(args, kwargs)
        if self._rows is None:
            return self._with(self._active, x)
        y: torch.Tensor = base(x)
        for name in self._active:
            run: Any = lambda own, *_, only=(name,): self._with(only, own)  # noqa: E731
            y = self._by_row(name, x, y, run)
        return y

    def _with(self, names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        """The convolution's output with these adapters applied."""
        owned = (
            value.dtype for name in names for value in self._all_params(name) if value.is_floating_point()
        )
        dtype = torch.promote_types(x.dtype, next(owned))
        dropout = self.training and any(self._methods[name][1].dropout for name in names)
        methods = [self._methods[name][0] for name in names]
        apart = dropout or dtype != x.dtype or all(_is_thin(method) for method in methods)
        if apart and all(method.traits.additive for method in methods):
            return self._added(names, x, dtype)
        weight, bias = self._wide(dtype)
        for name in names:
            weight, bias = self._fold(name, weight, bias, dtype)
        y = self._convolve(x.to(dtype), weight, bias)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def _added(self, names: tuple[str, ...], x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The base's output and the changes' own."""
        y: torch.Tensor = self._base(x)
        result = y
        for name in names:
            method, cfg = self._methods[name]
            inner = nn.functional.dropout(x.to(dtype), cfg.dropout, self.training)
            form = (
                method.normal_form(cfg, self._tensors(name, dtype), self._site) if _is_thin(method) else None
            )
            thin = (
                form is not None
                and low_rank.is_low_rank(form)
                and form.output_scale is None
                and form.shift is None
            )
            change = self._narrow(inner, form) if thin else self._whole(name, inner, dtype)
            result = result + (self._weigh(name, torch.zeros_like(change), change) if thin else change)
        return result.to(y.dtype)

    def _narrow(self, x: torch.Tensor, form: Any) -> torch.Tensor:
        """A change of low rank: the inputs of each group to the rank with the layer's own kernel, and from
        there to its outputs.
        """
        down, up, kernel = form.down.matrix, form.up.matrix, self.weight.shape[2:]
        groups: int = self._base.groups  # type: ignore[assignment]
        inner = self._convolve(x, down.repeat(groups, 1), None)
        return _CONVOLVE[len(kernel) - 1](inner, up.reshape(*up.shape, *(1,) * len(kernel)), groups=groups)

    def _whole(self, name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Any other change: its fold of a weight of zeros, or what its fold of the weight added to it."""
        weight, bias = self._wide(dtype)
        if not self._methods[name][0].traits.reads_weight:
            weight, bias = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        folded, moved = self._fold(name, weight, bias, dtype)
        return self._convolve(x, folded - weight, moved if moved is None or bias is None else moved - bias)

    def _wide(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The frozen weight as a matrix, and the bias."""
        site = self._with_weight(dtype)
        return site.weight, site.base_bias

    def _convolve(self, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's own convolution with another weight ``[any number of outputs, in / groups *
        kernel]``.
        """
        weight = from_matrix(self._site.kind, matrix, (len(matrix), *self.weight.shape[1:]))
        y: torch.Tensor = self._base._conv_forward(x, weight, bias)  # type: ignore[operator]
        return y


class SpanningConv(AdaptedConv):
    """A frozen convolution of groups with adapters that have none: what reads the inputs of all groups, and
    gives each its own outputs.
    """

    def _with(self, names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        """The base's output and the changes' own: no weight of the layer can hold them."""
        y: torch.Tensor = self._base(x)
        result = y
        for name in names:
            method, cfg = self._methods[name]
            dtype = torch.promote_types(x.dtype, next(value.dtype for value in self._all_params(name)))
            form = method.normal_form(cfg, self._tensors(name, dtype), self._site)
            change = self._across(nn.functional.dropout(x.to(dtype), cfg.dropout, self.training), form)
            result = result + (self._weigh(name, torch.zeros_like(change), change))
        return result.to(y.dtype)

    def _across(self, x: torch.Tensor, form: Any) -> torch.Tensor:
        """All inputs to the rank with the layer's own kernel, stride and padding, and from each group's share
        of it to its outputs.
        """
        base: Any = self._base
        kernel, blocks, padding = self.weight.shape[2:], form.up.blocks, base.padding
        if base.padding_mode != "zeros":
            x, padding = (
                nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode),
                0,
            )
        convolve = _CONVOLVE[len(kernel) - 1]
        inner = convolve(
            x, form.down.matrix.unflatten(1, (-1, *kernel)), None, base.stride, padding, base.dilation
        )
        up = blocks.reshape(-1, blocks.shape[-1], *(1,) * len(kernel))
        return convolve(inner, up, form.shift, groups=len(blocks))
