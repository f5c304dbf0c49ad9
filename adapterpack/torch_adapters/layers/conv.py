"""Wraps convolutions to hold adapters of weight methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter_methods import Method, from_matrix
from ...errors import Unsupported
from ..kernels import low_rank
from .calls import Args, Kwargs
from .layer import AdaptedLayer, NewAdapter

_CONVOLVE: tuple[Callable[..., Tensor], ...] = (
    nn.functional.conv1d,
    nn.functional.conv2d,
    nn.functional.conv3d,
)
"""The convolution function for 1, 2 and 3 spatial axes."""


def _is_thin(method: Method) -> bool:
    """Whether a method is nothing but a low-rank change that does not depend on the base's weight."""
    plain = method.traits.independent and method.traits.low_rank
    return plain and method.overrides.keys().isdisjoint({"forward", "fold"})


class AdaptedConv(AdaptedLayer):
    """A frozen convolution with adapters; methods see it as a linear layer ``[out, in / groups * kernel]``.

    A low-rank change runs as two narrow convolutions next to the base's. Any other change is merged into the
    weight for the call, and the layer's own convolution runs on the result. In half precision, where that
    would round the change away, and with dropout, which must act on the change alone, an additive change runs
    as a convolution of its own.
    """

    def _add(self, name: str, adapter: NewAdapter) -> None:
        """Adds an adapter; refuses dropout for methods that act on the weight itself."""
        if adapter.config.dropout and not adapter.method.traits.additive:
            raise Unsupported(
                f"the method {adapter.method.name} changes a convolution in its weight, where dropout on the "
                "input has no place",
                where=self._site.path,
                found=f"dropout {adapter.config.dropout}",
                remedy="set dropout to 0",
            )
        super()._add(name, adapter)

    def _run_active(self, args: Args, kwargs: Kwargs) -> Any:
        x, base = self._enter(args, kwargs)
        if self._rows is None:
            return self._with(self._active, x)
        return self._in_rows(x, base(x), lambda name, own, *_: self._with((name,), own))

    def _with(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        """Returns the convolution's output with the adapters ``names`` applied."""
        dtype = self._precision(names[0], x.dtype)
        held = [self._held[name] for name in names]
        dropout = self.training and any(one.config.dropout for one in held)
        # Compute the change apart from the base where merging would round it away or dropout must not touch
        # the base, and where it is cheaper.
        apart = dropout or dtype != x.dtype or all(_is_thin(one.method) for one in held)
        if apart and all(one.method.traits.additive for one in held):
            return self._added(names, x)
        site = self._with_weight(dtype)
        weight, bias = site.weight, site.base_bias
        for name in names:
            weight, bias = self._fold(name, weight, bias, dtype)
        y = self._convolve(x.to(dtype), weight, bias)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def _added(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        """Returns the base's output plus the output of each change."""
        y = self._base(x)
        result = y
        for name in names:
            dtype = self._precision(name, x.dtype)
            inner = nn.functional.dropout(x.to(dtype), self._held[name].config.dropout, self.training)
            result = result + self._change(name, inner, dtype)
        return result.to(y.dtype)

    def _change(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns what an additive adapter adds to the output at ``x``."""
        form = self._normal_form(name, dtype) if _is_thin(self._held[name].method) else None
        if (
            form is not None
            and low_rank.is_low_rank(form)
            and form.output_scale is None
            and form.shift is None
        ):
            return self._weigh(name, 0, self._narrow(x, form))  # type: ignore[no-any-return]
        return self._whole(name, x, dtype)

    def _narrow(self, x: Tensor, form: Any) -> Tensor:
        """Computes a low-rank change by two convolutions: to the rank with the layer's own kernel, per group,
        then to the outputs with a 1x1 kernel.
        """
        down = form.down.matrix
        up = form.up.matrix
        kernel = self.weight.shape[2:]
        groups = self._base.groups  # type: ignore[assignment]
        inner = self._convolve(x, down.repeat(groups, 1), None)
        return _CONVOLVE[len(kernel) - 1](inner, up.reshape(*up.shape, *(1,) * len(kernel)), groups=groups)

    def _whole(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Computes any other change by a convolution with the merged weight minus the original one."""
        site = self._with_weight(dtype)
        weight, bias = site.weight, site.base_bias
        if not self._held[name].method.traits.reads_weight:
            # The change does not depend on the weight, so merging it into zeros gives exactly the change,
            # without rounding.
            weight = torch.zeros_like(weight)
            bias = None if bias is None else torch.zeros_like(bias)
        folded, moved = self._fold(name, weight, bias, dtype)
        return self._convolve(x, folded - weight, moved if moved is None or bias is None else moved - bias)

    def _convolve(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """Runs the layer's own convolution with another weight, ``[any number of outputs, in / groups *
        kernel]``.
        """
        weight = from_matrix(self._site.kind, matrix, (len(matrix), *self.weight.shape[1:]))
        return self._base._conv_forward(x, weight, bias)  # type: ignore[operator]


class SpanningConv(AdaptedConv):
    """A frozen grouped convolution with adapters that ignore groups on the input side: the change of each
    group's outputs reads all inputs.
    """

    def _with(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        """Returns the base's output plus the output of each change: no weight of a grouped convolution can
        hold these changes.
        """
        return self._added(names, x)

    def _change(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Computes a change: from all inputs to the rank with the layer's own kernel, stride and padding,
        then from each group's share of the rank to its outputs.
        """
        base = self._base
        form = self._normal_form(name, dtype)
        kernel = self.weight.shape[2:]
        blocks = form.up.blocks
        padding = base.padding
        if base.padding_mode != "zeros":
            x = nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        convolve = _CONVOLVE[len(kernel) - 1]
        inner = convolve(
            x, form.down.matrix.unflatten(1, (-1, *kernel)), None, base.stride, padding, base.dilation
        )
        up = blocks.reshape(-1, blocks.shape[-1], *(1,) * len(kernel))
        return self._weigh(name, 0, convolve(inner, up, form.shift, groups=len(blocks)))
