"""Computes a frozen layer and a transform of its outputs in one step: a scale, or a rotation of pairs.

    y' = cos * y + sin * turned(y),   y = W x + b

As in :class:`~..adapter_methods.PairRotation`, ``cos`` and ``sin`` include the magnitudes; a scale has no
``sin``. If there are more rows than layer inputs, the backward pass computes the input's gradient as ``g (R
W)``: rotating the weight then costs less than rotating the gradient, and the gradient of ``y`` is never
stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...adapter_methods import NormalForm, PairRotation


class Turn(NamedTuple):
    """A transform of outputs: ``cos`` and ``sin`` (None: a scale) are ``[out]``, and the members of a pair
    are ``half`` apart.
    """

    cos: Tensor
    sin: Tensor | None
    half: int


def turn_of(form: NormalForm, width: int) -> Turn | None:
    """Returns the transform that a form, which leaves the input as it is and has no branch, applies to
    ``width`` outputs; None if it does anything else, apart from a shift.
    """
    if form.post is None:
        return (
            Turn(form.output_scale, None, 0)
            if form.output_scale is not None and form.output_scale.shape[0] == width
            else None
        )
    if isinstance(form.post, PairRotation) and form.output_scale is None and form.post.cos.shape[0] == width:
        return Turn(form.post.cos, form.post.sin, form.post.half)
    return None


def after(x: Tensor, weight: Tensor, bias: Tensor | None, turn: Turn) -> Tensor:
    """Returns ``cos * y + sin * turned(y)``, ``[..., out]``, where ``y`` is a frozen layer's output for ``x``
    ``[..., in]``.
    """
    y = _After.apply(x.reshape(-1, x.shape[-1]), weight, bias, turn.cos, turn.sin, turn.half)[0]
    return y.reshape(*x.shape[:-1], weight.shape[0])


class _After(torch.autograd.Function):
    """The layer with the transform, as an autograd function.

    ``y`` is an output too, so that second derivatives pass through it. Inputs and outputs are matrices: torch
    forbids changing a view that a custom function returned, and models change the outputs of their layers in
    place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor | None, half: int
    ) -> tuple[Tensor, Tensor]:
        """Returns the layer's output with and without the transform."""
        y = functional.linear(x, weight, bias)
        ctx.save_for_backward(weight, cos, sin, y)
        ctx.half = half
        ctx.set_materialize_grads(False)
        return _turn(y, cos, sin, half), y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, of_y: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients of ``x``, ``cos`` and ``sin``."""
        weight, cos, sin, y = ctx.saved_tensors
        half, (of_x, _, _, of_cos, of_sin, _) = ctx.half, ctx.needs_input_grad
        for_x = for_cos = for_sin = None
        if gradient is not None:
            if of_x and len(gradient) > weight.shape[1]:
                for_x = gradient @ _turn(weight, cos, sin, half, axis=0)
            elif of_x:
                for_x = _turn(gradient, cos, sin, half, back=True) @ weight
            for_cos = (gradient * y).sum(0) if of_cos else None
            if of_sin and sin is not None:
                (a, b), (to_a, to_b) = (
                    value.unflatten(1, (-1, 2, half)).unbind(2) for value in (y, gradient)
                )
                for_sin = torch.stack([-(to_a * b).sum(0), (to_b * a).sum(0)], dim=1).flatten()
        if of_y is not None and of_x:
            for_x = of_y @ weight if for_x is None else for_x + of_y @ weight
        return for_x, None, None, for_cos, for_sin, None


def _turn(y: Tensor, cos: Tensor, sin: Tensor | None, half: int, axis: int = 1, back: bool = False) -> Tensor:
    """Rotates the values along one of the two axes of ``y``; with ``back`` by the transpose, which is the
    rotation's backward pass.
    """
    tail = (1,) * (1 - axis)
    result = y * cos.reshape(-1, *tail)
    if sin is None:
        return result
    (a, to_a), (b, to_b) = (
        [value.unflatten(axis, (-1, 2, half)).select(axis + 1, side) for value in (y, result)]
        for side in (0, 1)
    )
    of_a, of_b = (sin.reshape(-1, 2, half, *tail).select(1, side) for side in (0, 1))
    to_a.addcmul_(b, of_b if back else of_a, value=1 if back else -1)
    to_b.addcmul_(a, of_a if back else of_b, value=-1 if back else 1)
    return result
