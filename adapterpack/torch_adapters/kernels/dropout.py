"""Dropout that keeps a seed instead of a mask: what is dropped is drawn again where the backward pass needs
it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_STEPS = 1 << 16
"""A share that is dropped is a multiple of one by so many."""
_EACH = 4
"""Numbers of two bytes that one random number of eight bytes is made of: on a CPU these are drawn one after
the other.
"""


class Dropout(NamedTuple):
    """One draw, the same for all tensors of a size: ``dropped / 65536`` of the numbers become zero, and the
    others make up for them.
    """

    seed: int
    dropped: int

    @classmethod
    def draw(cls, rate: float) -> Dropout:
        """A draw from torch's own random numbers, which checkpoints of a training and of activations
        restore.
        """
        return cls(int(torch.randint(1 << 62, ())), min(round(rate * _STEPS), _STEPS - 1))

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` with the dropped numbers zero."""
        return x * self.factors(x)

    def factors(self, x: torch.Tensor) -> torch.Tensor:
        """What each number of ``x``, or of another tensor of its size, is multiplied by: zero, or a little
        more than one.
        """
        generator = torch.Generator(x.device).manual_seed(self.seed)
        drawn = torch.empty(-(-x.numel() // _EACH), dtype=torch.int64, device=x.device).random_(
            -(1 << 63), None, generator=generator
        )
        kept = drawn.view(torch.int16)[: x.numel()].view(x.shape) >= self.dropped - _STEPS // 2
        return kept.to(x.dtype).mul_(_STEPS / (_STEPS - self.dropped))
