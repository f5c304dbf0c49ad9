"""How each kind of layer stores its weight, and how to turn that tensor into the matrix ``[out, in]`` that
methods see.

Every site has a kind, a key of :data:`LAYOUTS`. Methods only ever see matrices; code that handles the stored
tensor reads this table. It is written against the Python array API, so that the same lines convert numpy
arrays in a merge and torch tensors in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ...errors import Unsupported, nearest
from .arrays import array_namespace
from .operators import Array


class Layout(NamedTuple):
    """How a kind of layer stores the weight that a method sees as a matrix ``[out, in]``.

    ``axes``: how many axes the stored tensor may have; the axes after the second are flattened into the
    matrix's columns. ``turned``: the tensor is ``[in, out]``. ``stacked``: the first axis counts matrices,
    each adapted on its own. ``linear``: the layer computes ``x W^T + b`` along the last axis of its input.
    ``ids``: the inputs are indices of the matrix's columns (token ids). ``bare``: a site's path names a
    parameter, not a module that owns it as ``weight``. ``spanning``: the adapter reads the inputs of all
    groups of a grouped convolution, while each group of the layer reads only its own, so no weight can hold
    the change.
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
"""Kind of a site -> its layout.

``linear`` is ``nn.Linear``; ``transposed`` is GPT-2's ``Conv1D`` ``[in, out]``; ``embedding`` is
``[vocabulary, width]`` with token ids as inputs, and ``table`` the same tensor seen as one row per token;
``norm`` is a norm's vector, seen as one column; the convolutions are ``[out, in / groups, *kernel]``: without
groups, with groups, and with groups that the adapter ignores; ``parameter`` is a bare parameter ``[out,
in]``; ``experts`` are fused experts ``[experts, out, in]``, and ``turned_experts`` ``[experts, in, out]``.
"""

LINEAR = tuple(kind for kind, layout in LAYOUTS.items() if layout.linear)
"""The kinds of linear layers; a method need not care whether the weight is stored transposed."""
CONVOLUTIONS = tuple(
    kind for kind, layout in LAYOUTS.items() if layout.axes == _KERNELS and not layout.spanning
)
"""The kinds of convolutions, to whose unfolded kernel ``[out, in / groups * kernel]`` a method can be applied
as to any matrix.
"""
WEIGHTS = (*LINEAR, *CONVOLUTIONS)
"""The kinds supported by a method that can be folded into any matrix."""
STACKS = tuple(kind for kind, layout in LAYOUTS.items() if layout.bare)
"""The kinds of bare parameters, single or stacked."""
MATRICES = (*WEIGHTS, "embedding", *STACKS)
"""The kinds supported by a method that adds a change to any matrix, also to one whose columns are looked
up.
"""


def layout_of(kind: str) -> Layout:
    """Returns the layout of a kind.

    Raises:
        Unsupported: no layout has that name.
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
    """Whether a site of that kind is a stack of matrices, each with its own parameters; False for unknown
    kinds.
    """
    return kind in LAYOUTS and LAYOUTS[kind].stacked


def is_bare(kind: str) -> bool:
    """Whether a site of that kind is a parameter and not a module; False for unknown kinds."""
    return kind in LAYOUTS and LAYOUTS[kind].bare


def unfoldable(kind: str) -> str:
    """Returns why no weight of a layer of that kind can hold an adapter, or an empty string if it can or the
    kind is unknown.
    """
    spanning = kind in LAYOUTS and LAYOUTS[kind].spanning
    return (
        "the adapter lets each group of a convolution read the inputs of all, which no weight of groups "
        "can hold"
        if spanning
        else ""
    )


def takes_ids(kind: str) -> bool:
    """Whether the inputs at a site of that kind are token ids; False for unknown kinds."""
    return kind in LAYOUTS and LAYOUTS[kind].ids


def matrix_shape(kind: str, stored: Sequence[int]) -> tuple[int, int] | None:
    """Returns ``(out, in)`` of the matrix, or of each matrix of a stack, for a weight of the shape
    ``stored``; None if the kind cannot have that shape.

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
    """Returns a stored weight as ``[out, in]`` (a stack as ``[n, out, in]``), without a copy where possible.

    Example:
        >>> import numpy as np
        >>> to_matrix("transposed", np.zeros((3, 5))).shape
        (5, 3)
    """
    layout = layout_of(kind)
    xp = array_namespace(stored)
    if layout.turned:
        return xp.matrix_transpose(stored)
    return stored if layout.stacked or len(stored.shape) == 2 else xp.reshape(stored, (stored.shape[0], -1))


def from_matrix(kind: str, matrix: Array, stored: Sequence[int]) -> Array:
    """Reverses :func:`to_matrix`: returns the matrix as a tensor of the shape ``stored``."""
    xp = array_namespace(matrix)
    return xp.matrix_transpose(matrix) if layout_of(kind).turned else xp.reshape(matrix, tuple(stored))
