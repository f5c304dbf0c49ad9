"""Builds the pack of combined changes: each as a LoRA of scale 1, with what its parents share and the
truncation errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..adapter_methods import Arrays, LoRA, Method, Tensors
from ..io import Json
from ..lowrank import Factors, Loss
from ..manifest import Sites
from ..manifest import manifest as m
from ..pack import Pack, build
from .full_modules import CombinedModules
from .sites import JointSite


def as_lora(change: Factors, dtype: Any = np.float32) -> tuple[LoRA, Arrays]:
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


def build_composed(
    name: str,
    method: Method,
    adapters: Sites,
    base: m.Base,
    whole: CombinedModules,
    parents: Sequence[Pack],
    weights: Mapping[str, str | None],
    lineage: m.Lineage,
    shared: Tensors | None = None,
) -> Pack:
    """Builds a pack from combined changes and the fields that its parents share; ``weights`` are the base
    tensors of its sites, ``shared`` the parameters that its sites share.
    """
    licenses = {parent.manifest.license for parent in parents}
    of_modules = {
        group.path: group.weight
        for parent in parents
        for group in parent.manifest.full_groups
        if group.weight
    }
    return build(
        name,
        method,
        adapters,
        task=whole.task,
        base=base,
        shared=shared,
        full=whole.modules,
        problem=whole.problem,
        weights={**of_modules, **weights},
        lineage=lineage,
        license=licenses.pop() if len(licenses) == 1 else None,
    )


def truncation(losses: Mapping[str, Loss]) -> Json:
    """Returns the relative errors, of all sites together and of each, in the form that a manifest stores."""
    pooled = Loss(sum(loss.tail for loss in losses.values()), sum(loss.total for loss in losses.values()))
    return {"total": pooled.relative, "sites": {path: loss.relative for path, loss in losses.items()}}


def describe_losses(sites: Sequence[JointSite], losses: Mapping[str, Loss], left_out: Sequence[str]) -> Json:
    """Returns what a lineage says of the cut: the errors at the sites, the sites without a rank, and the
    errors of approximating changes without a low rank before.
    """
    details: Json = {"truncation": truncation(losses)}
    if left_out:
        details["left_out"] = list(left_out)
    if approximated := {joint.site.path: joint.loss for joint in sites if joint.loss.tail}:
        details["approximation"] = truncation(approximated)
    return details
