"""Moves what a model trains by noise, as training would."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@torch.no_grad()
def shake(model: AnyModule, size: float = 0.1, seed: int = 1) -> AnyModule:
    """The model, with normal noise times ``size`` added to every parameter that asks for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model
