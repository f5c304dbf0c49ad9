"""Computes a frozen layer and a transform of its outputs in one step: a scale, or a rotation of pairs.

    y' = cos * y + sin * turned(y),   y = W x + b

As in :class:`~..adapter_methods.PairRotation`: ``cos`` and ``sin`` hold the magnitudes, too; a scale alone
has no ``sin``. Backward, the gradient of the input is ``g (R W)`` where there are more rows than layer
inputs: turning the weight costs less than turning the gradient, and no gradient of ``y`` is ever a tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional

from ...adapter_methods import NormalForm, PairRotation


class Turn(NamedTuple):
    """``cos`` and ``sin`` are ``[out]``, pairs lie ``half`` apart."""

    cos: torch.Tensor
    sin: torch.Tensor | None
    half: int


def turn_of(form: NormalForm, width: int) -> Turn | None:
    """What a form does to ``width`` outputs if that is all it does, but for a shift; None where it does
    something else.
    """
    if form.pre is not None or form.down is not None or form.routes:
        return None
    if form.post is None:
        return (
            Turn(form.output_scale, None, 0)
            if form.output_scale is not None and form.output_scale.shape[0] == width
            else None
        )
    if isinstance(form.post, PairRotation) and form.output_scale is None and form.post.cos.shape[0] == width:
        return Turn(form.post.cos, form.post.sin, form.post.half)
    return None


def after(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, turn: Turn) -> torch.Tensor:
    """``cos * y + sin * turned(y)`` of ``x`` ``[..., in]`` and a frozen layer: ``[..., out]``."""
    y: torch.Tensor = _After.apply(x.reshape(-1, x.shape[-1]), weight, bias, turn.cos, turn.sin, turn.half)[0]
    return y.reshape(*x.shape[:-1], weight.shape[0])


class _After(torch.autograd.Function):
    """``y`` is a result, too: second derivatives go through it. Inputs and results are matrices: torch lets
    nobody change a view that a function made, and models change the outputs of their layers in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor | None,
        half: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output turned, and as it is."""
        y = functional.linear(x, weight, bias)
        ctx.save_for_backward(weight, cos, sin, y)
        ctx.half = half
        ctx.set_materialize_grads(False)
        return _turn(y, cos, sin, half), y

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor | None, of_y: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of ``x``, ``cos`` and ``sin``."""
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


def _turn(
    y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor | None, half: int, axis: int = 1, back: bool = False
) -> torch.Tensor:
    """Numbers along an axis of ``y`` (two of them) turned, or turned ``back``: by the transpose."""
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
