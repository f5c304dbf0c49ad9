"""Convolutions with adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import Unsupported
from ..methods import Method, fold, from_matrix
from .layer import AdaptedLayer, Tensors

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution by its weight as it is: some classes normalise it, or pad in their own way."""
    return isinstance(module, CONVOLUTIONS) and any(type(module).forward is kind.forward for kind in CONVOLUTIONS)


class AdaptedConv(AdaptedLayer):
    """A frozen convolution with adapters: for a method a layer ``[out, in / groups * kernel]``; groups stay groups.

    The layer's own convolution runs on the folded weight. Where that would cost the change its precision, in half precision, or dropout is
    to act on the change alone, an additive change is a convolution of its own beside the base's.
    """

    def add(self, name: str, method: Method, cfg: Any, params: Any, constants: Tensors, shared: Tensors) -> None:
        """See :meth:`Adapted.add`.

        Raises:
            Unsupported: dropout, by a method whose change does not stand beside the layer.
        """
        if cfg.dropout and not method.traits.additive:
            raise Unsupported(f"the method {method.name} changes a convolution in its weight, where dropout on the input has no place",
                              where=self.site.path, found=f"dropout {cfg.dropout}", remedy="set dropout to 0")
        super().add(name, method, cfg, params, constants, shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution's output with the active adapters applied."""
        if not self.active:
            base: torch.Tensor = self.base(x)
            return base
        owned = (value.dtype for name in self.active for value in self._own(name) if value.is_floating_point())
        dtype = torch.promote_types(x.dtype, next(owned))
        dropout = self.training and any(self.methods[name][1].dropout for name in self.active)
        if (dropout or dtype != x.dtype) and all(self.methods[name][0].traits.additive for name in self.active):
            return self._beside(x, dtype)
        weight, bias = self._wide(dtype)
        for name in self.active:
            weight, bias = self._folded(name, weight, bias, dtype)
        y = self._convolved(x.to(dtype), weight, bias)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def _beside(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The base's output, and for each adapter the convolution with its change: its fold of a weight of zeros."""
        y: torch.Tensor = self.base(x)
        result = y
        for name in self.active:
            method, cfg = self.methods[name]
            inner = nn.functional.dropout(x.to(dtype), cfg.dropout, self.training)
            weight, bias = self._wide(dtype)
            if not method.traits.reads_weight:
                weight, bias = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
            folded, moved = self._folded(name, weight, bias, dtype)
            change = None if moved is None else moved if bias is None else moved - bias
            result = result + self._convolved(inner, folded - weight, change)
        return result.to(y.dtype)

    def _wide(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The frozen weight as a matrix, and the bias."""
        site = self._with_weight(dtype)
        return site.weight, site.base_bias

    def _folded(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        method, cfg = self.methods[name]
        site = self._with_weight(dtype) if method.traits.reads_weight else self.site
        return fold(method, cfg, self.tensors(name, dtype), site, weight, bias)

    def _convolved(self, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = self.base._conv_forward(x, from_matrix(self.site.kind, matrix, self.weight.shape), bias)  # type: ignore[operator]
        return y
