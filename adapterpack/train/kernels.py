"""Fast forward and backward for common structures of the normal form; chosen by structure, never by method name."""

from __future__ import annotations

from typing import Any

import torch

from ..methods import AttachForm, Dense


class _LowRank(torch.autograd.Function):
    """``y + (x A^T) B^T`` that keeps only ``x``, ``A`` and ``B`` for the backward pass.

    ``x A^T`` is computed again, which costs rank/width of a layer. ``x`` and ``y`` may be of a lower precision than ``A`` and ``B``: ``x``
    is kept as it came, and every product is taken in theirs.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """``y`` ``[..., out]``, ``x`` ``[..., in]``, ``A`` ``[r, in]``, ``B`` ``[out, r]`` -> ``[..., out]``."""
        ctx.save_for_backward(x, A, B)
        ctx.dtype = y.dtype
        inner = _flat(x).to(A.dtype) @ A.T
        # One pass over the output where the dtypes allow it: neither the branch nor the sum is a tensor of its own.
        wide = torch.addmm(_flat(y), inner, B.T) if y.dtype == B.dtype else _flat(y) + inner @ B.T
        return wide.reshape(y.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of ``y``, ``x``, ``A`` and ``B``."""
        x, A, B = ctx.saved_tensors
        of_y, of_x, of_a, of_b = ctx.needs_input_grad
        flat_x, flat_g = _flat(x).to(A.dtype), _flat(gradient)
        inner = flat_g @ B
        return (
            gradient.to(ctx.dtype) if of_y else None,
            (inner @ A).reshape(x.shape).to(x.dtype) if of_x else None,
            inner.T @ flat_x if of_a else None,
            flat_g.T @ (flat_x @ A.T) if of_b else None,
        )


def _flat(value: torch.Tensor) -> torch.Tensor:
    """``[..., width]`` as ``[rows, width]``."""
    return value.reshape(value.shape[:-1].numel(), value.shape[-1])


def is_low_rank(form: AttachForm) -> bool:
    """Whether a form has a dense low-rank branch and no gate, leaves the input alone, and does not mix outputs."""
    beside = form.pre is None and form.post is None and len(form.routes) == 0
    return beside and isinstance(form.down, Dense) and isinstance(form.up, Dense)


def add_low_rank(form: AttachForm, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``scale * (y + up(down(x))) + shift`` for a form of which :func:`is_low_rank` holds; ``x`` ``[..., in]``, ``y`` ``[..., out]``.

    The result is of the wider precision of ``y`` and the form.
    """
    result: torch.Tensor = _LowRank.apply(y, x, form.down.matrix, form.up.matrix)  # type: ignore[union-attr]
    result = result if form.scale is None else result * form.scale
    return result if form.shift is None else result + form.shift
