"""Mixtures of experts at a layer: branches whose weights a gate computes from the layer's input.

    route(x) = sum_e g_e(x) up_e (down_e x)

The factors of all experts are stacked, so that any number of experts costs two matrix products, and the gate
multiplies the narrow value between them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from ...errors import Unsupported
from .arrays import array_namespace
from .operators import Array

MASKS = ("@tokens", "@encoder_tokens")
"""Parameters that a layer receives during a pass if its method looks at entire rows: masks ``[rows, tokens]``
of the tokens that are not padding, in the model's input and in its encoder's.
"""


def mask_of(masks: Sequence[Array], shape: tuple[int, ...], where: str) -> Array | None:
    """Returns the mask of shape ``[rows, tokens]`` for the tokens that a layer sees; None if no mask has that
    shape.

    Raises:
        Unsupported: two different masks have that shape.
    """
    fitting = [mask for mask in masks if tuple(mask.shape) == shape]
    if len(fitting) > 1 and bool((fitting[0] != fitting[1]).any()):
        raise Unsupported(
            "this layer may see either of two inputs of one length whose padding differs",
            where=where,
            remedy="pad the inputs of encoder and decoder to different lengths",
        )
    return fitting[0] if fitting else None


class Weights(Protocol):
    """A gate: computes the weight of each expert."""

    def weights(self, x: Array) -> Array:
        """Returns the weights of the experts at ``x`` ``[..., in]``: ``[..., experts]``, or an array that
        broadcasts to it.
        """
        ...


def softmax(scores: Array) -> Array:
    """Returns the softmax over the last axis."""
    xp = array_namespace(scores)
    powers = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return powers / xp.sum(powers, axis=-1, keepdims=True)


def keep_largest(scores: Array, top_k: int, other: float) -> Array:
    """Returns scores ``[..., experts]`` with ``other`` in place of all but the ``top_k`` largest."""
    xp = array_namespace(scores)
    experts = scores.shape[-1]
    if top_k >= experts:
        return scores
    # A threshold instead of indices keeps every score that ties with the k-th, in any array library.
    least = xp.sort(scores, axis=-1)[..., experts - top_k : experts - top_k + 1]
    return xp.where(scores >= least, scores, xp.full_like(scores, other))


def softmax_of_largest(scores: Array, top_k: int) -> Array:
    """Returns the softmax over the ``top_k`` largest scores of ``[..., experts]``; the other experts get
    0.
    """
    return softmax(keep_largest(scores, top_k, -math.inf))


class SoftmaxGate(NamedTuple):
    """A softmax over the ``top_k`` largest scores ``x keys^T + bias``, or ``|x keys^T| + bias``. Scores that
    tie with the k-th all count.

    ``keys`` ``[experts, in]``, ``bias`` ``[experts]`` or None.
    """

    keys: Array
    top_k: int
    bias: Array | None = None
    magnitude: bool = False

    def weights(self, x: Array) -> Array:
        """The weights of the experts at ``x``."""
        xp = array_namespace(x)
        scores = x @ self.keys.T
        scores = xp.abs(scores) if self.magnitude else scores
        scores = scores if self.bias is None else scores + self.bias
        return softmax_of_largest(scores, self.top_k)


class Attention(NamedTuple):
    """A softmax over the ``top_k`` largest scores ``q(x) . k(D_e x)``, where ``D_e x`` is the output of
    expert e. Scores that tie with the k-th all count.

    Query and key are linear and the experts are low-rank, so everything reduces to ``query`` ``[R, in]`` and
    the stacked ``down`` ``[R, in]``: the score of expert e is the sum of ``(x query^T) (x down^T)`` over its
    ``widths[e]`` of the R components.
    """

    query: Array
    down: Array
    widths: tuple[int, ...]
    top_k: int

    def weights(self, x: Array) -> Array:
        """The weights of the experts at ``x``."""
        xp = array_namespace(x)
        products = (x @ self.query.T) * (x @ self.down.T)
        parts = []
        start = 0
        for width in self.widths:
            parts.append(xp.sum(products[..., start : start + width], axis=-1, keepdims=True))
            start += width
        return softmax_of_largest(xp.concat(parts, axis=-1), self.top_k)


class Precomputed(NamedTuple):
    """Weights ``[..., experts]`` computed by an earlier pass, valid only for exactly the tokens that the
    layer sees.
    """

    values: Array | None

    def weights(self, x: Array) -> Array:
        """Returns the weights of the experts at ``x``.

        Raises:
            Unsupported: there was no earlier pass, or the layer sees other tokens than it did.
        """
        if self.values is None:
            raise Unsupported(
                "the weights of the experts come from a first pass, and there was none",
                remedy="call the model that the pack was attached to, not a part of it",
            )
        if tuple(self.values.shape[:-1]) != tuple(x.shape[:-1]):
            raise Unsupported(
                "the weights of the experts are those of other tokens than this layer sees",
                expected=tuple(x.shape[:-1]),
                found=tuple(self.values.shape[:-1]),
                remedy="compose packs that adapt layers inside the blocks only",
            )
        return self.values


class Fixed(NamedTuple):
    """Divides the rows of a batch, or the positions of each row, among the experts: the first ``sizes[0]`` to
    the first expert, the next ``sizes[1]`` to the second, and so on.

    With ``by_row`` the sizes must add up to the number of rows; by position, the last expert also gets all
    that follow. Tokens that a mask in ``masks`` marks as padding are not counted.
    """

    sizes: tuple[int, ...]
    by_row: bool
    masks: tuple[Array, ...] = ()

    def weights(self, x: Array) -> Array:
        """Returns the weights of the experts at ``x``.

        Raises:
            Unsupported: the number of rows differs from the sum of the sizes, or the input has no such axis.
        """
        if x.ndim < 2:
            raise Unsupported(
                "this layer's input has no such axis to divide",
                expected="[rows, positions, width]",
                found=tuple(x.shape),
            )
        if self.by_row and len(x) != sum(self.sizes):
            raise Unsupported(
                "the batch has another number of rows than are divided",
                expected=sum(self.sizes),
                found=len(x),
                remedy="give a batch of that size, or use a bank, where every row names its adapter",
            )
        xp = array_namespace(x)
        mask = mask_of(self.masks, tuple(x.shape[:-1]), "split")
        if mask is not None:
            places = xp.cumulative_sum(xp.astype(mask, xp.int64), axis=1) - 1
        elif self.by_row:
            places = xp.reshape(xp.arange(len(x), device=x.device), (-1,) + (1,) * (x.ndim - 2))
        else:
            places = xp.arange(x.shape[-2], device=x.device)
        ends = itertools.accumulate(self.sizes[:-1])
        chosen = sum((xp.astype(places >= end, xp.int64) for end in ends), start=xp.zeros_like(places))
        experts = range(len(self.sizes))
        return xp.stack([xp.astype(chosen == expert, x.dtype) for expert in experts], axis=-1)


class Route(NamedTuple):
    """Experts that share one gate. ``down`` ``[R, in]`` and ``up`` ``[out, R]`` stack their factors; expert e
    owns ``widths[e]`` of the R rows.
    """

    gate: Weights
    down: Array
    up: Array
    widths: tuple[int, ...]

    def apply(self, x: Array, branch: Array) -> Array:
        """Returns what the experts add to the layer's output, ``[..., out]``, for the inputs ``[..., in]`` of
        the gate (``x``) and of the experts (``branch``, which is ``x`` after dropout).
        """
        weights = self.gate.weights(x)
        xp = array_namespace(weights)
        spread = [
            xp.broadcast_to(weights[..., e : e + 1], (*weights.shape[:-1], width))
            for e, width in enumerate(self.widths)
        ]
        # Weighting the R narrow components once replaces a weighted sum over the experts' wide outputs.
        return ((branch @ self.down.T) * xp.concat(spread, axis=-1)) @ self.up.T
