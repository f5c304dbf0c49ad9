"""Computes the cross entropy of a linear layer's outputs without storing them: one block of rows at a time,
each with its gradient.

The logits of a batch are by far the largest tensor in training a language model with a large vocabulary. If
the head is frozen, all that the backward pass needs is the gradient of the head's input, which is as small as
the input and can be computed in the forward pass (Hsu et al. 2024, https://arxiv.org/abs/2410.10989, section
3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_NUMBERS = 1 << 23
"""Logits in one block, 32 MiB."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float
) -> Tensor:
    """Returns the sum of the cross entropies of ``hidden W^T + b`` for ``targets``, with label smoothing as
    in torch.

    ``hidden`` is ``[rows, in]``, ``targets`` ``[rows]``; the weight ``[out, in]`` and the bias are frozen.
    Computes in float32 or finer.
    """
    return _Blocks.apply(hidden, weight, bias, targets, smoothing)


def by_blocks(
    head: Callable[[Tensor], Tensor], width: int, hidden: Tensor, targets: Tensor, smoothing: float
) -> Tensor:
    """Returns the same sum for any ``head`` with ``width`` outputs; the backward pass calls the head again
    for each block.
    """

    def of_block(block: Tensor, wanted: Tensor) -> Tensor:
        logits = head(block)
        return functional.cross_entropy(
            logits.to(_wide(logits)), wanted, reduction="sum", label_smoothing=smoothing
        )

    size = _rows(width)
    sums = [
        checkpoint(of_block, block, wanted, use_reentrant=False)
        for block, wanted in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return torch.stack(sums).sum()


def _rows(width: int) -> int:
    """Returns the rows of a block."""
    return max(_NUMBERS // width, 1)


def _wide(value: Tensor) -> torch.dtype:
    """Returns the precision to compute in: float32, or the tensor's if finer."""
    return torch.promote_types(value.dtype, torch.float32)


class _Blocks(torch.autograd.Function):
    """Computes the loss and the gradient of ``hidden`` in the forward pass, and keeps only that gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float
    ) -> Tensor:
        """Returns the loss, and computes the gradient of ``hidden`` along the way."""
        total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        of_hidden = None
        if ctx.needs_input_grad[0]:
            of_hidden = torch.empty_like(hidden)
        size = _rows(len(weight))
        width = len(weight)
        for start in range(0, len(hidden), size):
            logits = functional.linear(hidden[start : start + size], weight, bias)
            logits = logits.to(_wide(logits))
            wanted = targets[start : start + size, None]
            own = (1 - smoothing) * logits.gather(1, wanted)
            if smoothing:
                own += smoothing * logits.mean(1, keepdim=True)
            # Softmax in place with a single exponential: ``logsumexp`` would need another tensor of the
            # block's size and a second exponential.
            largest = logits.amax(1, keepdim=True)
            sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
            total += (largest + sums.log() - own).sum()
            if of_hidden is not None:
                # Now probabilities; subtracting the targets makes them gradients.
                logits.div_(sums)
                if smoothing:
                    logits.sub_(smoothing / width)
                logits.scatter_add_(1, wanted, logits.new_full((), smoothing - 1).expand(wanted.shape))
                of_hidden[start : start + size] = logits.to(weight.dtype) @ weight
            # Free the block before the next one is allocated.
            del logits
        ctx.save_for_backward(*(() if of_hidden is None else (of_hidden,)))
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradient of ``hidden``."""
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * gradient.to(of_hidden.dtype), None, None, None, None
