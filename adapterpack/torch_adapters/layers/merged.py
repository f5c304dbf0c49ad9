"""Records which adapters are merged into a model's weights, and the parameters that they replaced."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ...errors import Unsupported

_ATTRIBUTE = "_adapterpack_merged"
"""The attribute of a model that holds its :class:`Merged` record."""


class Kept(NamedTuple):
    """A parameter replaced by a merge: ``module`` had ``original`` (None: nothing) as its parameter ``leaf``
    and now has ``merged``.
    """

    module: nn.Module
    leaf: str
    original: nn.Parameter | None
    merged: nn.Parameter


class Merged(NamedTuple):
    """The adapters that are merged into the weights, in order, and the parameters that they replaced."""

    names: tuple[str, ...]
    kept: list[Kept]

    @property
    def nbytes(self) -> int:
        """The bytes of original parameters that are kept to restore the base."""
        return sum(kept.original.nbytes for kept in self.kept if kept.original is not None)


def merged_in(model: nn.Module) -> Merged | None:
    """Returns what is merged into a model, or None."""
    merged: Merged | None = model.__dict__.get(_ATTRIBUTE)
    return merged


def remember(model: nn.Module, merged: Merged | None) -> None:
    """Records what is merged into a model; None deletes the record."""
    if merged is None:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = merged


def require_unmerged(model: nn.Module) -> None:
    """Raises if adapters are merged into a model's weights, for callers that need the base or single
    adapters.

    Raises:
        Unsupported: adapters are merged.
    """
    merged = merged_in(model)
    if merged is not None:
        raise Unsupported(
            "adapters are merged into this model's weights",
            found=", ".join(merged.names),
            remedy="call adapterpack.unmerge_from(model) first",
        )


def restore(kept: list[Kept]) -> None:
    """Puts the original parameter objects back; they move to the device and dtype that the model was moved to
    meanwhile.
    """
    for module, leaf, original, _ in reversed(kept):
        if original is not None:
            # Moving ``data`` keeps the parameter object, to which optimizers and ties may refer.
            now = module._parameters[leaf]
            if isinstance(now, torch.Tensor) and (now.device, now.dtype) != (original.device, original.dtype):
                original.data = original.data.to(now.device, now.dtype)
        module._parameters[leaf] = original
