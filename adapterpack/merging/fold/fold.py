"""Computes the change that adapters make to one weight, and applies it to blocks of rows, in reused
buffers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..._native import lowrank
from ...adapter_methods import Dense, Method, NormalForm, array_namespace, complete, is_stacked
from ...adapter_methods.core.base import fold_form
from ...base.codecs.storage import LazyMatrix
from ...io import FLOATS, dtype_name
from ...pack import Adapter

Rows = np.ndarray
ToDevice = Callable[[np.ndarray], Any]
Fold = Callable[[Rows, "np.ndarray | None", slice], "tuple[Rows, np.ndarray | None]"]


class Contribution(NamedTuple):
    """An adapter of one pack at one weight: its method, its parameters, and the factor that multiplies its
    change.
    """

    pack: str
    method: Method
    adapter: Adapter
    weight: float


def slice_of(contribution: Contribution, number: int) -> Contribution:
    """Returns the contribution to matrix ``number`` of its weight: its own slice of a stack, or the
    contribution itself.
    """
    adapter = contribution.adapter
    if not is_stacked(adapter.site.kind):
        return contribution
    return contribution._replace(
        adapter=adapter._replace(params={name: value[number] for name, value in adapter.params.items()})
    )


class Bound(NamedTuple):
    """A contribution ready to be applied: the function that folds a block of rows, and the normal form if the
    function uses it.
    """

    fold: Fold
    form: NormalForm | None


def bind(
    contribution: Contribution,
    dtype: np.dtype,
    weight: np.ndarray | LazyMatrix,
    bias: np.ndarray | None,
    to_device: ToDevice | None = None,
) -> Bound:
    """Converts the parameters to ``dtype`` and computes the normal form, once for all blocks of ``weight``
    ``[out, in]``.

    A method that reads the base through ``attach`` gets copies of the whole weight and bias, in at least
    float32; other methods need none. ``to_device`` moves an array to the device that computes, if that is not
    numpy.
    """
    method, adapter = contribution.method, contribution.adapter
    site = dataclasses.replace(adapter.site, out_features=weight.shape[0], in_features=weight.shape[1])
    if method.traits.reads_weight:
        site = dataclasses.replace(
            site, weight=_widen(weight, dtype), base_bias=None if bias is None else _widen(bias, dtype)
        )
    params = complete(
        method, adapter.config, {name: _widen(value, dtype) for name, value in adapter.params.items()}, site
    )
    if to_device is not None:
        params = {name: to_device(value) for name, value in params.items()}
        site = dataclasses.replace(
            site,
            weight=None if site.weight is None else to_device(site.weight),
            base_bias=None if site.base_bias is None else to_device(site.base_bias),
        )
    if fold := method.overrides.get("fold"):
        return Bound(lambda block, bias, rows: fold(adapter.config, params, site, block, bias, rows), None)
    form = method.normal_form(adapter.config, params, site)
    return Bound(lambda block, bias, rows: fold_form(form, block, bias, rows), form)


def _widen(value: np.ndarray | LazyMatrix, dtype: np.dtype) -> np.ndarray:
    return (
        value.astype(dtype, copy=False)
        if isinstance(value, LazyMatrix) or dtype_name(value.dtype) in FLOATS
        else value
    )


def changes_nothing(contribution: Contribution, bound: Bound, shape: tuple[int, int]) -> bool:
    """Whether a contribution to a weight ``(out, in)`` certainly changes nothing: its factor is zero, or its
    form is the identity.

    A matrix that maps a random vector to zero is zero with probability one, so no full product is needed.
    """
    if contribution.weight == 0:
        return True
    form = bound.form
    if form is None:
        return False
    y, x = (_probe(width) for width in shape)
    factors = _dense_factors(form)
    if factors is not None:
        return not np.any(factors[0] @ (factors[1] @ x))
    moved = (
        form.down is not None
        and np.any(form.down.apply(x) if form.up is None else form.up.apply(form.down.apply(x))),
        form.pre is not None and np.any(form.pre.apply(x) != x),
        form.output_scale is not None and np.any(form.output_scale != 1),
        form.shift is not None and np.any(form.shift),
        form.post is not None and np.any(form.post.apply(y) != y),
    )
    return not any(moved)


@lru_cache(8)
def _probe(width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(width, np.float32)


class Change(NamedTuple):
    """All contributions to one weight, ready to be applied block by block.

    Plain factor pairs are stacked, ``up = [w_1 up_1, ...]`` and ``down = [down_1; ...]``, so that any number
    of adapters is one product; ``others`` are the other additive ones as (factor, reads the base, fold). If a
    contribution is not additive, all are in ``chain`` and are folded one after the other, as active adapters
    are in a model. ``whole``: some need all rows of the matrix at once. ``energy``: ``|D|_F^2`` of the
    change, where the factors give it; otherwise it is summed over the blocks. ``panels`` is ``down`` as
    :mod:`~adapterpack._native.lowrank` multiplies it.
    """

    up: np.ndarray | None = None
    down: np.ndarray | None = None
    others: tuple[tuple[float, bool, Fold], ...] = ()
    chain: tuple[Fold, ...] = ()
    whole: bool = False
    energy: float | None = None
    panels: np.ndarray | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is a product of factors and nothing else."""
        return self.up is not None and self.down is not None and not self.others and not self.chain

    def transposed(self) -> Change | None:
        """Returns the same change of the transposed matrix, or None if it is not just a product of
        factors.
        """
        if not self.is_plain or self.up is None or self.down is None:
            return None
        return Change(
            self.down.T, self.up.T, energy=self.energy, panels=lowrank.panels(self.down.T, self.up.T)
        )

    def apply(
        self, weight: Rows, bias: np.ndarray | None, rows: slice, change: Rows, new: Rows
    ) -> np.ndarray | None:
        """Writes the change of a block into ``change`` and the changed block into ``new``; returns the
        changed bias.
        """
        if self.chain:
            folded, moved = self._follow_chain(weight, bias, rows)
            np.copyto(new, folded)
            np.subtract(new, weight, out=change)
            return moved
        if self.up is None or self.down is None:
            change.fill(0)
        else:
            lowrank.product(self.up[rows], self.down, self.panels, change)
        moved = self._add_others(weight, bias, rows, change)
        np.add(weight, change, out=new)
        return moved

    def apply_to(self, weight: Any, bias: Any | None, rows: slice) -> tuple[Any, Any, Any | None]:
        """Returns the change of a block, the changed block and the changed bias, for arrays of any library
        (numpy or torch).
        """
        xp = array_namespace(weight)
        if self.chain:
            folded, moved = self._follow_chain(weight, bias, rows)
            return folded - weight, folded, moved
        change = xp.zeros_like(weight) if self.up is None else xp.matmul(self.up[rows], self.down)
        moved = self._add_others(weight, bias, rows, change)
        return change, weight + change, moved

    def _follow_chain(self, weight: Any, bias: Any | None, rows: slice) -> tuple[Any, Any | None]:
        """Folds the chain into a block, one after the other; returns the changed block and bias."""
        for fold in self.chain:
            weight, bias = fold(weight, bias, rows)
        return weight, bias

    def _add_others(self, weight: Any, bias: Any | None, rows: slice, change: Any) -> Any | None:
        """Adds what is no plain product of factors to the ``change`` of a block, and returns the changed
        bias.
        """
        xp = array_namespace(weight)
        total = bias
        for factor, reads, fold in self.others:
            # The fold of zero is the change itself, free of the base's rounding, unless the method looks at
            # the base.
            start, offset = (
                (weight, bias)
                if reads
                else (xp.zeros_like(weight), None if bias is None else xp.zeros_like(bias))
            )
            folded, moved = fold(start, offset, rows)
            change += factor * (folded - start)
            if total is not None and moved is not None and offset is not None:
                total = total + factor * (moved - offset)
        return total


def prepare(
    contributions: Sequence[Contribution],
    dtype: np.dtype,
    weight: np.ndarray | LazyMatrix,
    bias: np.ndarray | None,
    to_device: ToDevice | None = None,
) -> Change:
    """Returns the change that ``contributions`` make together to ``weight`` ``[out, in]`` and its ``bias``,
    computed in ``dtype``.
    """
    bound = [bind(contribution, dtype, weight, bias, to_device) for contribution in contributions]
    whole = not all(contribution.method.traits.row_separable for contribution in contributions)
    if not all(contribution.method.traits.additive for contribution in contributions):
        return Change(chain=tuple(one.fold for one in bound), whole=whole)
    ups = []
    downs = []
    others = []
    for contribution, (fold, form) in zip(contributions, bound, strict=True):
        factors = None if form is None else _dense_factors(form)
        if factors is None:
            others.append((contribution.weight, contribution.method.traits.reads_weight, fold))
        else:
            ups.append(contribution.weight * factors[0])
            downs.append(factors[1])
    up, down = (_join(ups, 1), _join(downs, 0)) if ups else (None, None)
    if up is None:
        return Change(others=tuple(others), whole=whole)
    return Change(
        up,
        down,
        tuple(others),
        whole=whole,
        energy=None if others else _energy(up, down),
        panels=lowrank.panels(up, down),
    )


def _energy(up: Any, down: Any) -> float:
    """``|up @ down|_F^2 = <up^T up, down down^T>`` in float64: two small Gram matrices, without forming the
    product.
    """
    xp = array_namespace(up, down)
    up, down = xp.astype(up, xp.float64), xp.astype(down, xp.float64)
    return max(0.0, float(xp.sum((up.T @ up) * (down @ down.T))))


def _join(parts: list[Any], axis: int) -> Any:
    return parts[0] if len(parts) == 1 else array_namespace(*parts).concat(parts, axis=axis)


def _dense_factors(form: NormalForm) -> tuple[np.ndarray, np.ndarray] | None:
    if form.is_branch and isinstance(form.up, Dense) and isinstance(form.down, Dense):
        return form.up.matrix, form.down.matrix
    return None
