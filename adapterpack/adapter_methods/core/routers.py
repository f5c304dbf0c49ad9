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


def _softmax_of_largest(scores: Array, top_k: int) -> Array:
    """Returns the softmax over the ``top_k`` largest scores of ``[..., experts]``; the other experts get
    0.
    """
    xp, experts = array_namespace(scores), scores.shape[-1]
    if top_k < experts:
        # A threshold instead of indices keeps every score that ties with the k-th, in any array library.
        least = xp.sort(scores, axis=-1)[..., experts - top_k : experts - top_k + 1]
        scores = xp.where(scores >= least, scores, xp.full_like(scores, -math.inf))
    powers = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return powers / xp.sum(powers, axis=-1, keepdims=True)


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
        return _softmax_of_largest(scores, self.top_k)


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
        products, parts, start = (x @ self.query.T) * (x @ self.down.T), [], 0
        for width in self.widths:
            parts.append(xp.sum(products[..., start : start + width], axis=-1, keepdims=True))
            start += width
        return _softmax_of_largest(xp.concat(parts, axis=-1), self.top_k)


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
    """Assigns one expert to each section of an axis of the input. Section i has ``sizes[i]`` entries along
    ``axis`` and uses expert ``experts[i]`` of ``total``.

    With ``whole`` the sections must fill the axis; without it the last section takes the rest. Tokens that a
    mask in ``masks`` marks as padding are not counted.
    """

    sizes: tuple[int, ...]
    axis: int
    whole: bool
    experts: tuple[int, ...]
    total: int
    masks: tuple[Array, ...] = ()

    def weights(self, x: Array) -> Array:
        """Returns the weights of the experts at ``x``.

        Raises:
            Unsupported: the number of rows differs from the sum of the sizes, or the input has no such axis.
        """
        axis = self.axis if self.axis >= 0 else x.ndim + self.axis
        if not 0 <= axis < x.ndim - 1:
            raise Unsupported(
                "this layer's input has no such axis to divide",
                expected="[rows, positions, width]",
                found=tuple(x.shape),
            )
        length = x.shape[axis]
        if self.whole and length != sum(self.sizes):
            raise Unsupported(
                "the batch has another number of rows than are divided",
                expected=sum(self.sizes),
                found=length,
                remedy="give a batch of that size, or use a bank, where every row names its adapter",
            )
        xp = array_namespace(x)
        mask = mask_of(self.masks, tuple(x.shape[:-1]), "split") if axis == x.ndim - 2 else None
        if mask is not None:
            return self._counted(xp.cumulative_sum(xp.astype(mask, xp.int64), axis=1) - 1, x)
        pieces, start = [], 0
        for place, (size, expert) in enumerate(zip(self.sizes, self.experts, strict=True)):
            end = length if place == len(self.sizes) - 1 else min(start + size, length)
            one_hot = [
                xp.ones_like(x[..., :1]) if number == expert else xp.zeros_like(x[..., :1])
                for number in range(self.total)
            ]
            cut = (slice(None),) * axis + (slice(start, end),)
            pieces.append(xp.concat(one_hot, axis=-1)[cut])
            start = end
        return xp.concat(pieces, axis=axis)

    def _counted(self, places: Array, x: Array) -> Array:
        """Returns the weights for tokens ``[rows, tokens]`` numbered by ``places`` within their rows; padding
        gets arbitrary weights.
        """
        xp, ends = array_namespace(x), list(itertools.accumulate(self.sizes))
        stretch = sum(xp.astype(places >= end, xp.int64) for end in ends[:-1])
        chosen = [
            [stretch == number for number, expert in enumerate(self.experts) if expert == one]
            for one in range(self.total)
        ]
        return xp.stack([xp.astype(sum(inside) > 0, x.dtype) for inside in chosen], axis=-1)


class Route(NamedTuple):
    """Experts that share one gate. ``down`` ``[R, in]`` and ``up`` ``[out, R]`` stack their factors; expert e
    owns ``widths[e]`` of the R rows.
    """

    gate: Weights
    down: Array
    up: Array
    widths: tuple[int, ...]

    def apply(self, x: Array) -> Array:
        """Returns what the experts add to the layer's output: ``[..., in]`` to ``[..., out]``."""
        return self.mixed(x, x)

    def mixed(self, x: Array, branch: Array) -> Array:
        """Does what :meth:`apply` does with separate inputs for the gate (``x``) and the experts (``branch``,
        after dropout).
        """
        weights = self.gate.weights(x)
        xp = array_namespace(weights)
        spread = [
            xp.broadcast_to(weights[..., e : e + 1], (*weights.shape[:-1], width))
            for e, width in enumerate(self.widths)
        ]
        # Weighting the R narrow components once replaces a weighted sum over the experts' wide outputs.
        return ((branch @ self.down.T) * xp.concat(spread, axis=-1)) @ self.up.T
