"""Wraps normalisation layers to hold adapters that change their weight and bias."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.func import functional_call
from torch.nn import functional

from ...errors import Unsupported
from .calls import Args, Kwargs
from .layer import AdaptedLayer, NewAdapter
from .weights import require_in_memory
from .wrapper import innermost


class AdaptedNorm(AdaptedLayer):
    """A frozen normalisation layer with adapters: calls the layer with the weight and bias into which they
    are merged.

    Methods see its weight as a column ``[n, 1]``. The merged values are rounded to the base's precision, as
    merging the adapter would.
    """

    def _add(self, name: str, adapter: NewAdapter) -> None:
        require_in_memory(innermost(self), self._site.path)
        super()._add(name, adapter)

    def _run_active(self, args: Args, kwargs: Kwargs) -> Any:
        if self._rows is None:
            return self._with(self._active, args, kwargs)
        x, base = self._enter(args, kwargs)
        if len(args) + len(kwargs) > 1:
            raise Unsupported(
                "this layer has inputs beside the one that its adapters change, so they cannot differ "
                "from row to row",
                where=self._site.path,
                found=type(self._base).__name__,
                remedy="use one adapter for all rows",
            )
        return self._in_rows(x, base(x), lambda name, own, *_: self._with((name,), (own,), {}))

    def _with(self, names: tuple[str, ...], args: Args, kwargs: Kwargs) -> Any:
        """Returns the layer's output with the adapters ``names`` applied."""
        weight, bias = self._fold_all(names)
        stored = {"weight": weight, "bias": bias} if self._site.bias else {"weight": weight}
        # The same result as by functional_call, without swapping parameters.
        if type(self._base) is nn.LayerNorm:
            x, _ = self._enter(args, kwargs)
            return functional.layer_norm(x, self._base.normalized_shape, eps=self._base.eps, **stored)
        return functional_call(self._base, stored, args, kwargs)
