"""Turns a combined change into a LoRA of scale 1, and records its base tensors and the truncation error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..adapter_methods.lora import LoRA
from ..lowrank.factors import Factors
from ..lowrank.spectra import Loss
from ..pack.pack import Pack


def as_lora(change: Factors, dtype: Any = np.float32) -> tuple[LoRA, dict[str, np.ndarray]]:
    """Returns the change as a LoRA of the same rank (at least 1) and of scale 1."""
    m, n = change.shape
    A, B = change if change.rank else (np.zeros((1, n)), np.zeros((m, 1)))
    return _of_rank(len(A)), {
        "lora_A": np.ascontiguousarray(A, dtype),
        "lora_B": np.ascontiguousarray(B, dtype),
    }


@lru_cache
def _of_rank(rank: int) -> LoRA:
    """Returns a config that all sites of a rank share, so that code that checks every config checks it only
    once.
    """
    return LoRA(r=rank, alpha=float(rank))


def whole_tensors(parents: Sequence[Pack]) -> dict[str, str | None]:
    """Maps each fully trained module of the parents to its tensor in the base."""
    return {
        group.path: group.weight
        for parent in parents
        for group in parent.manifest.groups
        if group.role == "full" and group.weight
    }


def truncation(losses: Mapping[str, Loss]) -> dict[str, Any]:
    """Returns the relative errors, of all sites together and of each, in the form that a manifest stores."""
    pooled = Loss(sum(loss.tail for loss in losses.values()), sum(loss.total for loss in losses.values()))
    return {"total": pooled.relative, "sites": {path: loss.relative for path, loss in losses.items()}}
