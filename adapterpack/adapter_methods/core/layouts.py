"""How each kind of layer stores its weight, and the matrix ``[out, in]`` that a method sees of it.

A site has a kind; methods only ever see matrices, and code that handles a layer's own form reads this table.
It is written against the Python array API, so that the same lines turn numpy arrays in a merge and torch
tensors in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ...errors import Unsupported, nearest
from .arrays import array_namespace
from .operators import Array


class Layout(NamedTuple):
    """How a weight is stored that a method sees as a matrix ``[out, in]``.

    ``axes``: how many axes the stored tensor may have; those after the second belong to the matrix's columns.
    ``turned``: it is stored ``[in, out]``. ``stacked``: its first axis counts matrices of which each is
    adapted on its own. ``linear``: the layer is ``x W^T + b`` along the last axis of its input. ``ids``: its
    inputs are the numbers of the matrix's columns. ``bare``: a site's path is that of the parameter, not of a
    module that owns it as its ``weight``. ``spanning``: an adapter there reads the inputs of all groups of a
    convolution, where the layer's own groups read their own alone, so that no weight can hold it.
    """

    axes: tuple[int, ...]
    turned: bool = False
    stacked: bool = False
    linear: bool = False
    ids: bool = False
    bare: bool = False
    spanning: bool = False


_KERNELS = (3, 4, 5)
LAYOUTS: dict[str, Layout] = {
    "linear": Layout((2,), linear=True),
    "transposed": Layout((2,), turned=True, linear=True),
    "embedding": Layout((2,), turned=True, ids=True),
    "table": Layout((2,)),
    "norm": Layout((1,)),
    "conv": Layout(_KERNELS),
    "grouped_conv": Layout(_KERNELS),
    "spanning_conv": Layout(_KERNELS, spanning=True),
    "parameter": Layout((2,), bare=True),
    "experts": Layout((3,), stacked=True, bare=True),
    "turned_experts": Layout((3,), turned=True, stacked=True, bare=True),
}
"""Kind of a site -> its layout: ``nn.Linear``; GPT-2's ``Conv1D`` ``[in, out]``; an embedding ``[vocabulary,
width]``, whose inputs are ids, and the same as a table, a row for every token; a norm's vector, which is a
column; convolutions ``[out, in / groups, *kernel]``, without groups, with them, and with groups that the
adapter does not have; a bare parameter ``[out, in]``; fused experts ``[experts, out, in]``, and ``[experts,
in, out]``.
"""

LINEAR = tuple(kind for kind, layout in LAYOUTS.items() if layout.linear)
"""The kinds of linear layers: which way round the weight is stored is no matter of a method's."""
CONVOLUTIONS = tuple(
    kind for kind, layout in LAYOUTS.items() if layout.axes == _KERNELS and not layout.spanning
)
"""The kinds of convolutions: what a method does to a matrix it does to the unfolded kernel ``[out, in /
groups * kernel]``.
"""
WEIGHTS = (*LINEAR, *CONVOLUTIONS)
"""What a method takes that folds into any matrix."""
STACKS = tuple(kind for kind, layout in LAYOUTS.items() if layout.bare)
"""Bare parameters, and stacks of them."""


def layout_of(kind: str) -> Layout:
    """The layout of a kind.

    Raises:
        Unsupported: no layer is of that kind.
    """
    if kind not in LAYOUTS:
        raise Unsupported(
            "no layer is of this kind",
            found=repr(kind),
            expected=", ".join(LAYOUTS),
            remedy=nearest(kind, LAYOUTS),
        )
    return LAYOUTS[kind]


def is_stacked(kind: str) -> bool:
    """Whether a site of that kind is a stack of matrices, each with parameters of its own; what is in no
    table is not.
    """
    return kind in LAYOUTS and LAYOUTS[kind].stacked


def is_bare(kind: str) -> bool:
    """Whether a site of that kind is a parameter and not a module; what is in no table is not."""
    return kind in LAYOUTS and LAYOUTS[kind].bare


def unfoldable(kind: str) -> str:
    """Why no weight of a layer of that kind can hold an adapter there; empty where it can, and for what is in
    no table.
    """
    spanning = kind in LAYOUTS and LAYOUTS[kind].spanning
    return (
        "the adapter lets each group of a convolution read the inputs of all, which no weight of groups "
        "can hold"
        if spanning
        else ""
    )


def takes_ids(kind: str) -> bool:
    """Whether the inputs at a site of that kind are ids; those of what is in no table are not."""
    return kind in LAYOUTS and LAYOUTS[kind].ids


def matrix_shape(kind: str, stored: Sequence[int]) -> tuple[int, int] | None:
    """``(out, in)`` of a weight of the ``stored`` shape, of each matrix where it is a stack; None where the
    kind has no such shape.

    Example:
        >>> matrix_shape("conv", (8, 3, 5, 5)), matrix_shape("embedding", (100, 16)), matrix_shape("linear",
        ...     (7,))
        ((8, 75), (16, 100), None)
    """
    layout = layout_of(kind)
    if len(stored) not in layout.axes:
        return None
    first, *rest = stored[1:] if layout.stacked else stored
    return (math.prod(rest), first) if layout.turned else (first, math.prod(rest))


def to_matrix(kind: str, stored: Array) -> Array:
    """A stored weight as ``[out, in]`` (``[n, out, in]`` where it is a stack), without a copy where it can
    be.

    Example:
        >>> import numpy as np
        >>> to_matrix("transposed", np.zeros((3, 5))).shape
        (5, 3)
    """
    layout, xp = layout_of(kind), array_namespace(stored)
    if layout.turned:
        return xp.matrix_transpose(stored)
    return stored if layout.stacked or len(stored.shape) == 2 else xp.reshape(stored, (stored.shape[0], -1))


def from_matrix(kind: str, matrix: Array, stored: Sequence[int]) -> Array:
    """The reverse of :func:`to_matrix` for a weight of the ``stored`` shape."""
    xp = array_namespace(matrix)
    return xp.matrix_transpose(matrix) if layout_of(kind).turned else xp.reshape(matrix, tuple(stored))
