"""Dropout that stores a seed instead of a mask, and draws the mask again in the backward pass.

A stored mask costs as much memory as the layer's input, at every adapted layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 1 << 16
"""The dropout rate is rounded to a multiple of 1 / 65536, the resolution of a 16-bit random number."""
_EACH = 4
"""How many 16-bit numbers are cut from one 64-bit random number: CPUs draw these one after the other, so
fewer draws are faster.
"""


class Dropout(NamedTuple):
    """One draw of dropout, with the same mask for all tensors of one size.

    Sets ``dropped / 65536`` of the values to zero and scales the others up to keep the expected value.
    """

    seed: int
    dropped: int

    @classmethod
    def draw(cls, rate: float) -> Dropout:
        """Draws a seed from torch's own generator, whose state training checkpoints and activation
        checkpointing restore.
        """
        return cls(int(torch.randint(1 << 62, ())), min(round(rate * _STEPS), _STEPS - 1))

    def of(self, x: Tensor) -> Tensor:
        """Returns ``x`` with dropout applied."""
        return x * self.factors(x)

    def factors(self, x: Tensor) -> Tensor:
        """Returns the factor of each value in ``x`` or a tensor of its size: zero, or slightly more than
        one.
        """
        generator = torch.Generator(x.device).manual_seed(self.seed)
        drawn = torch.empty(-(-x.numel() // _EACH), dtype=torch.int64, device=x.device).random_(
            -(1 << 63), None, generator=generator
        )
        kept = drawn.view(torch.int16)[: x.numel()].view(x.shape) >= self.dropped - _STEPS // 2
        return kept.to(x.dtype).mul_(_STEPS / (_STEPS - self.dropped))
