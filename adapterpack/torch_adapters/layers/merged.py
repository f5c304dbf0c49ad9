"""What is folded into a model's weights at the moment, and what stood there before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ...errors import Unsupported

_ATTRIBUTE = "_adapterpack_merged"
"""The attribute of a model that holds its :class:`Merged`."""


class Kept(NamedTuple):
    """A parameter that was folded: ``module`` had ``original`` (None: nothing) under ``leaf``, and has
    ``merged`` now.
    """

    module: nn.Module
    leaf: str
    original: nn.Parameter | None
    merged: nn.Parameter


class Merged(NamedTuple):
    """The adapters that are folded into the weights, in order, and the parameters that stood there before."""

    names: tuple[str, ...]
    kept: list[Kept]

    @property
    def nbytes(self) -> int:
        """The bytes that are kept, so that the base can be restored."""
        return sum(kept.original.nbytes for kept in self.kept if kept.original is not None)


def merged_in(model: nn.Module) -> Merged | None:
    """What is folded into a model, or None."""
    merged: Merged | None = model.__dict__.get(_ATTRIBUTE)
    return merged


def remember(model: nn.Module, merged: Merged | None) -> None:
    """Notes what is folded into a model; None: nothing any more."""
    if merged is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = merged


def require_unmerged(model: nn.Module) -> None:
    """Checks that nothing is folded into a model's weights, for what looks at the base or at single adapters.

    Raises:
        Unsupported: something is.
    """
    merged = merged_in(model)
    if merged is not None:
        raise Unsupported(
            "adapters are merged into this model's weights",
            found=", ".join(merged.names),
            remedy="call adapterpack.unmerge_from(model) first",
        )


def restore(kept: list[Kept]) -> None:
    """Puts the parameters of before back, the very objects; where the model was moved or cast meanwhile, they
    follow.
    """
    for module, leaf, original, _ in reversed(kept):
        if original is not None:
            now = module._parameters[leaf]
            if isinstance(now, torch.Tensor) and (now.device, now.dtype) != (original.device, original.dtype):
                original.data = original.data.to(now.device, now.dtype)
        module._parameters[leaf] = original
