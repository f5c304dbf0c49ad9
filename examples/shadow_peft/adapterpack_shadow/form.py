"""The normal form of the kind "shadow": a state alongside the residual stream corrects the input of each
block, whose output updates it.

    h_l = o_(l-1) + alpha W_up W_down (o_(l-1) - s_(l-1)),   o_l = block_l(h_l)
    g = sigmoid(G(o_l)),   s_l = (1 - g) s_(l-1) + g T(o_l)

``o`` are the hidden states and ``s`` the state, both ``[..., width]``; T and G are two layers each, with a
GELU between them (Li et al. 2026, arXiv 2604.19254, equations 2 to 7). Where the state begins, a second model
says. No weight can hold this, since what enters a block depends on all tokens before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from adapterpack.adapter_methods.core.arrays import array_namespace
from adapterpack.adapter_methods.core.base import Traits
from adapterpack.adapter_methods.core.operators import Array
from adapterpack.adapter_methods.forms.blocks import ACTIVATIONS

TRAITS = Traits(
    additive=False,
    identity_at_init=True,
    row_separable=False,
    low_rank=False,
    quantizable=False,
    batchable=False,
    layers=("layer",),
    exclusive=True,
)
"""What methods of this kind have in common: a layer of the model is a site, and one adapter is active at a
time.
"""


class TwoLayers(NamedTuple):
    """``second(gelu(first(x)))``: ``first`` ``[u, width]`` and ``second`` ``[width, u]``, each with its
    bias.
    """

    first: Array
    first_bias: Array
    second: Array
    second_bias: Array

    def apply(self, x: Array) -> Array:
        """``[..., width]`` to the same."""
        return ACTIVATIONS["gelu"](x @ self.first.T + self.first_bias) @ self.second.T + self.second_bias


class ShadowForm(NamedTuple):
    """The normal form at one block: ``down`` ``[r, width]``, ``up`` ``[width, r]``, the step ``alpha``, and
    what moves the state on.
    """

    down: Array
    up: Array
    alpha: float
    transform: TwoLayers
    gate: TwoLayers


def inject(
    form: ShadowForm, hidden: Array, state: Array, drop: Callable[[Array], Array] | None = None
) -> Array:
    """What enters the block in place of ``hidden``; both and the ``state`` are ``[..., width]``. ``drop`` is
    the dropout while training.

    Example:
        >>> import numpy as np
        >>> layer = TwoLayers(*(np.zeros(shape) for shape in ((1, 2), (1,), (2, 1), (2,))))
        >>> form = ShadowForm(np.array([[1.0, 0.0]]), np.array([[0.0], [2.0]]), 0.5, layer, layer)
        >>> inject(form, np.array([[3.0, 1.0]]), np.array([[1.0, 1.0]])).tolist()
        [[3.0, 3.0]]
    """
    apart = hidden - state
    return hidden + form.alpha * ((apart if drop is None else drop(apart)) @ form.down.T @ form.up.T)


def advance(form: ShadowForm, hidden: Array, state: Array) -> Array:
    """The next state, of the block's output ``hidden`` and the state before it.

    Example:
        >>> import numpy as np
        >>> layer = TwoLayers(*(np.zeros(shape) for shape in ((1, 2), (1,), (2, 1), (2,))))
        >>> advance(ShadowForm(np.zeros((1, 2)), np.zeros((2, 1)), 0.1, layer, layer), np.ones((1, 2)),
        ...     np.ones((1, 2))).tolist()
        [[0.5, 0.5]]
    """
    xp = array_namespace(hidden)
    # the sigmoid, without an exponential that overflows
    gate = 0.5 * (1 + xp.tanh(0.5 * form.gate.apply(hidden)))
    return (1 - gate) * state + gate * form.transform.apply(hidden)
