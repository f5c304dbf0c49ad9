"""Arrow: routes each token to experts by vectors computed from the experts themselves, without training.

Source: Ostapenko et al. 2024, arXiv 2405.11157, section 3.2.

    f(x) = base(x) + sum_i g_i D_i x,   g = softmax over the k largest s_i
    s_i = |x . v_i| / T,   v_i = top right singular vector of D_i

The direction ``v_i`` is the input direction in which expert i changes the output most. GenKnowSub (arXiv
2505.10939) first subtracts general knowledge from each expert, ``D_i - mean_j G_j``, which is a sum below the
router: ``arrow(sum(a, -0.5*g, -0.5*h), ...)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import NonFinite
from .. import Arrays, Params, PositiveFloat, PositiveInt, Random, SoftmaxGate
from .base import NodeKind, NodePart, NodeSettings, Parts, mix
from .registry import NODES

KEYS = "keys"


@dataclass(frozen=True)
class Arrow(NodeSettings):
    """``top_k`` is the number of experts per token (all, if there are fewer); a higher ``temperature``
    weights them more evenly.
    """

    top_k: PositiveInt = 3
    temperature: PositiveFloat = 1.0


def prototype(down: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Returns the top right singular vector of ``up down``, ``[in]``, from the factors ``[r, in]`` and
    ``[out, r]``; zeros if the change is zero.

    It computes a thin QR of both factors and the SVD of the r x r core in float64, and never forms the dense
    change. The sign of a singular vector is arbitrary, so the entry of largest magnitude is made positive.

    Raises:
        NonFinite: a factor or their product is not finite.

    Example:
        >>> prototype(np.array([[0.0, 2.0], [1.0, 0.0]]), np.eye(2))
        array([0., 1.])
    """
    # With orthonormal bases taken off both sides, the small core has the singular values of the change.
    right, right_core = np.linalg.qr(down.astype(np.float64).T)
    with np.errstate(all="ignore"):  # overflow is reported below
        core = np.linalg.qr(up.astype(np.float64), mode="r") @ right_core.T
    if not np.isfinite(core).all():
        raise NonFinite(
            "an expert's change is too large to have a direction",
            remedy="train the adapter with a smaller learning rate",
        )
    _, values, turned = np.linalg.svd(core, full_matrices=False)
    if not values.size or values[0] == 0:
        return np.zeros(down.shape[1])
    vector = right @ turned[0]
    signed: np.ndarray = vector * np.sign(vector[np.argmax(np.abs(vector))]) + 0.0
    return signed


def _join(settings: Arrow, parts: Parts, tensors: Params) -> NodePart | None:
    return mix(
        parts,
        lambda down, up, ranks: SoftmaxGate(
            tensors[KEYS] / settings.temperature, settings.top_k, magnitude=True
        ),
    )


def _make(settings: Arrow, parts: Sequence[NodePart], rng: Random) -> Arrays:
    keys = [prototype(np.asarray(part.down), np.asarray(part.up)) for part in parts]
    return {KEYS: np.stack(keys).astype(np.float32)}


arrow = NODES.register(
    NodeKind(
        name="arrow",
        summary="each token to the experts whose strongest direction it lies in; nothing is trained",
        paper="https://arxiv.org/abs/2405.11157",
        formula=(
            "f(x) = base(x) + sum_i g_i D_i x,  g = softmax over the k largest |x . v_i| / T,  v_i = top "
            "right singular vector of D_i"
        ),
        settings=Arrow,
        join=_join,
        tensors=lambda settings, count, site: {KEYS: (count, site.in_features)},
        made=_make,
        examples=(
            "arrow(a, b, c, top_k=2)",
            "arrow(a, b, temperature=0.5)",
            "sum(0.5*c, 2*arrow(a, b, top_k=1))",
            "arrow(sum(a, -0.5*c), sum(b, -0.5*c), top_k=1)",
            "stack(arrow(a, b, top_k=1), arrow(b, c))",
        ),
    )
)
