"""Reads PEFT's adapters of ``torch.nn.MultiheadAttention``: which of its parameters they change, and by how
much.

PEFT stores the factors for ``in_proj_weight`` under the attention's own path, and those for ``out_proj``
under a second wrapper (:data:`OUT`). PEFT up to 0.21.2 adds the change of ``out_proj`` twice, in every
forward pass and in a merge, so an adapter trained there means twice that change.
"""

from __future__ import annotations

import re
from typing import Any

from ..core.peft_form import PeftContent

OUT = ".base_layer.out_proj"
"""What PEFT appends to the path of an attention module for its ``out_proj``."""
_TWICE = (0, 21, 2)
"""The last version of PEFT that adds the change twice."""


def attention_parameters(content: PeftContent) -> PeftContent:
    """Replaces each attention site by sites for the two parameters that it changes; returns everything else
    unchanged.
    """
    owners = [path.removesuffix(OUT) for path in content.sites if path.endswith(OUT)]
    owners = [owner for owner in owners if owner in content.sites]
    if not owners:
        return content
    times = 2 if _counted_twice(content.written.get("peft_version")) else 1
    cfg = content.config
    sites = dict(content.sites)
    ranks = dict(cfg.rank_pattern)
    alphas = dict(cfg.alpha_pattern)
    kinds = dict(content.kinds)
    for owner in owners:
        here = cfg.at(owner)
        for path, old, factor in (
            (f"{owner}.in_proj_weight", owner, 1),
            (f"{owner}.out_proj.weight", f"{owner}{OUT}", times),
        ):
            sites[path] = sites.pop(old)
            # Doubling alpha doubles the change, which is what PEFT applied.
            ranks[f"^{path}"], alphas[f"^{path}"], kinds[path] = here.r, factor * here.alpha, "parameter"
    return content.configure(rank_pattern=ranks, alpha_pattern=alphas)._replace(sites=sites, kinds=kinds)


def _counted_twice(version: Any) -> bool:
    """Whether that version of PEFT adds the change of ``out_proj`` twice; a folder without a version is older
    and does.

    Example:
        >>> _counted_twice("0.21.2"), _counted_twice("0.22.0"), _counted_twice(None)
        (True, False, True)
    """
    numbers = (
        re.match(r"([0-9]{1,6})\.([0-9]{1,6})\.([0-9]{1,6})", version) if isinstance(version, str) else None
    )
    return numbers is None or tuple(map(int, numbers.groups())) <= _TWICE
