"""Fast forward and backward for common structures of the normal form; chosen by structure, never by method name."""

from __future__ import annotations

from typing import Any

import torch

from ..methods import AttachForm, Dense


class _LowRank(torch.autograd.Function):
    """``(x A^T) B^T`` that keeps only ``x``, ``A`` and ``B`` for the backward pass: ``x A^T`` is recomputed, which costs rank/width of a layer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """``x`` ``[..., in]``, ``A`` ``[r, in]``, ``B`` ``[out, r]`` -> ``[..., out]``."""
        ctx.save_for_backward(x, A, B)
        return (x @ A.T) @ B.T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Gradients of ``x``, ``A`` and ``B``."""
        x, A, B = ctx.saved_tensors
        flat_x, flat_g = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        inner = flat_g @ B
        grad_x = (inner @ A).reshape(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, inner.T @ flat_x, flat_g.T @ (flat_x @ A.T)


def branch(form: AttachForm, x: torch.Tensor) -> torch.Tensor | None:
    """``up(down(x))`` of a form that is nothing but a dense low-rank branch, or None for any other structure."""
    plain = form.pre is None and form.scale is None and form.shift is None
    if plain and isinstance(form.down, Dense) and isinstance(form.up, Dense):
        result: torch.Tensor = _LowRank.apply(x, form.down.matrix, form.up.matrix)
        return result
    return None
