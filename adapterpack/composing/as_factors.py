"""Writes the change of any adapter at one site as two factors: exactly where its form has a low rank, else
approximately, with the loss.

The code looks at the form that the method attaches (:class:`~adapterpack.adapter_methods.NormalForm`) and its
traits, never at its name:

- two factors and nothing else: they are the change;
- a Kronecker product: its factors are the products of those of its two parts;
- for any other change the weight before the fold is subtracted from the weight after it, and the difference
  is approximated. Where the fold scales or turns the weight (DoRA, OFT, IA3), that needs the base.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from ..adapter_methods import (
    Dense,
    Kronecker,
    NormalForm,
    Params,
    Site,
    complete,
    fold,
    is_stacked,
    require_widths,
    to_matrix,
)
from ..base import Checkpoint, module_parameter
from ..errors import Unsupported
from ..lowrank import Cut, Factors, InMemory, Loss, largest
from ..lowrank.factors import times
from ..pack import Adapter

KEEP_APART = "merge this pack into the base, or serve the packs side by side in a bank bundle"


class FactoredChange(NamedTuple):
    """A change ``factor up A`` with ``A`` ``[r, n]`` and ``up`` ``[m, r]``, and the error (``tail``) of
    writing it so, which is 0 where the factors are exact.
    """

    A: np.ndarray
    up: np.ndarray
    factor: float = 1.0
    loss: Loss = Loss(0.0, 0.0)

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return len(self.up), self.A.shape[1]

    @property
    def factors(self) -> Factors:
        """Returns the change as factors, with ``B = factor up``."""
        return Factors(self.A, times(self.up, self.factor))

    @property
    def exact(self) -> bool:
        """Whether the factors equal the change up to the rounding of float32."""
        return not self.loss.tail


def represent(adapter: Adapter, *, base: Checkpoint | None = None, cut: Cut | None = None) -> FactoredChange:
    """Returns the change that an adapter makes to the weight of its site as factors that include the
    adapter's scale; float32 or wider.

    Args:
        adapter: one site with its method and parameters.
        base: the checkpoint, for methods whose change depends on the weight that it changes.
        cut: how much of a change that has no low rank is kept; without it such a change is refused.

    Raises:
        Unsupported: the method does not act on weights, changes a bias, needs the base or a cut, or the site
            is a stack of matrices.

    Example:
        >>> from adapterpack import LoRA
        >>> from adapterpack.adapter_methods import Site, get
        >>> params = {"lora_A": np.ones((1, 3), np.float32), "lora_B": np.ones((2, 1), np.float32)}
        >>> change = represent(Adapter(Site("layer", 3, 2), LoRA(r=1, alpha=2), params, None, get("lora")))
        >>> change.exact, change.factors.dense()[0]
        (True, array([2., 2., 2.], dtype=float32))
    """
    require_representable(adapter, base is not None)
    method, site = adapter.method, adapter.site
    weight = bias = None
    if not method.traits.independent:
        weight, bias = _of_base(adapter, base)
        site = dataclasses.replace(
            site, weight=weight, base_bias=bias, out_features=weight.shape[0], in_features=weight.shape[1]
        )
    else:
        site = with_widths(adapter, base)
    params = complete(method, adapter.config, adapter.wide, site)
    if "fold" not in method.overrides:
        exact = exact_factors(adapter, params, site)
        if exact is not None:
            if not all(exact.shape):
                require_widths(site)
            return exact
    cut = require_cut(adapter, cut)
    if weight is None:
        require_widths(site)
        weight = np.zeros((site.out_features, site.in_features), np.float32)
    factors, loss = largest(InMemory(_change(adapter, params, site, weight, bias)), cut).cut(cut)
    return FactoredChange(*factors, loss=loss)


def require_representable(adapter: Adapter, based: bool) -> None:
    """Checks that factors can represent the adapter's change at all; ``based`` says whether the base is
    available.

    Raises:
        Unsupported: the method does not act on weights, or at some positions only, or needs the base; the
            site is a stack of matrices.
    """
    method, site = adapter.method, adapter.site
    if method.kind != "weight" or method.is_positional:
        expected = "a method that changes weights"
        found = f"not additive: a {method.kind} method"
        if method.kind == "weight":
            expected = "a change that is the same at every position"
            found = "not the same at every position"
        raise Unsupported(
            f"changes of the method {method.name} cannot be combined by their factors",
            where=site.path,
            expected=expected,
            found=found,
            remedy="serve the packs side by side in a bank bundle",
        )
    if is_stacked(site.kind):
        raise Unsupported(
            "the matrices of a stack are not composed", where=site.path, found=site.kind, remedy=KEEP_APART
        )
    if not based and not method.traits.independent:
        raise Unsupported(
            f"a change of the method {method.name} depends on the weight that it changes",
            where=site.path,
            expected="the base",
            found="not independent of the base weight, or not additive",
            remedy=f"give it with --base (base=); or {KEEP_APART}",
        )


def with_widths(adapter: Adapter, base: Checkpoint | None) -> Site:
    """Returns the site of an adapter. Takes the widths from the base's weight where there is a base and the
    pack does not state them.
    """
    site = adapter.site
    if base is None or (site.in_features and site.out_features):
        return site
    stored = np.broadcast_to(
        np.float32(0), base.tensors[base.require_weight(site.path, adapter.weight)].shape
    )
    rows, columns = to_matrix(site.kind, stored).shape
    return dataclasses.replace(site, out_features=rows, in_features=columns)


def require_cut(adapter: Adapter, cut: Cut | None) -> Cut:
    """Returns ``cut`` if it limits the rank, which approximating a change without a low rank needs.

    Raises:
        Unsupported: it sets no limit.
    """
    if cut is None or not cut.settings:
        raise Unsupported(
            f"changes of the method {adapter.method.name} have no low rank, so factors only approximate them",
            where=adapter.site.path,
            expected="a rank or an energy to approximate them by",
            found="not low-rank",
            remedy=f"give one, such as --rank 16 (rank=16); or {KEEP_APART}",
        )
    return cut


def _change(
    adapter: Adapter, params: Params, site: Site, weight: np.ndarray, bias: np.ndarray | None
) -> np.ndarray:
    """Folds the adapter into the weight and returns the difference to the weight before: ``[out, in]``."""
    before = np.zeros(len(weight), weight.dtype) if bias is None else bias
    folded, moved = fold(adapter.method, adapter.config, params, site, weight, before)
    if moved is not None and not np.allclose(moved, before, rtol=1e-4, atol=1e-6):
        raise Unsupported(
            f"the method {adapter.method.name} changes a bias, which the factors of a weight cannot hold",
            where=site.path,
            remedy=KEEP_APART,
        )
    return np.asarray(folded - weight)


def exact_factors(adapter: Adapter, params: Params, site: Site) -> FactoredChange | None:
    """Returns the factors that the method's own form has, if their rank is low or the method declares it low;
    else None.
    """
    form = adapter.method.normal_form(adapter.config, params, site)
    if form.is_branch and form.down is not None and form.up is not None:
        up, factor = form.up if isinstance(form.up, Dense) else Dense(form.up.dense())
        A = np.asarray(form.down.dense())
        B = np.asarray(up)
        low = adapter.method.traits.low_rank or 2 * len(A) <= min(len(B), A.shape[1])
        return FactoredChange(A, B, factor) if low else None
    if isinstance(form.down, Kronecker) and form == NormalForm(down=form.down):
        (B1, A1), (B2, A2) = _split(np.asarray(form.down.left)), _split(np.asarray(form.down.right))
        if 2 * len(A1) * len(A2) <= min(len(B1) * len(B2), A1.shape[1] * A2.shape[1]):
            return FactoredChange(np.kron(A1, A2), np.kron(B1, B2))
    return None


def _split(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns two factors of a small matrix, of its numerical rank."""
    u, values, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    kept = max(1, int(np.count_nonzero(values > 4 * np.finfo(matrix.dtype).eps * values[0])))
    halves = np.sqrt(values[:kept])
    return (u[:, :kept] * halves).astype(matrix.dtype), (vt[:kept] * halves[:, None]).astype(matrix.dtype)


def _of_base(adapter: Adapter, base: Checkpoint | None) -> tuple[np.ndarray, np.ndarray | None]:
    site = adapter.site
    assert base is not None
    name = base.require_weight(site.path, adapter.weight)
    stored = to_matrix(site.kind, base.read(name))
    weight = stored.astype(np.float64 if stored.dtype == np.float64 else np.float32)
    bias = module_parameter(name, "bias")
    return weight, base.read(bias).astype(weight.dtype) if bias in base.tensors else None
