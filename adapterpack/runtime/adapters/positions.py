"""Computes at which positions of a batch the adapters act, for graphs that take this as an input (activated
LoRA and its like).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...adapter_methods.core.token_positions import Acts
from ...bundle.manifest import MappedSite
from ...errors import Unsupported
from ...pack.pack import Pack


def acting(
    rules: Mapping[str, Acts | None],
    names: Sequence[str | None],
    ids: np.ndarray,
    mask: np.ndarray,
    before: np.ndarray | None,
) -> np.ndarray:
    """Returns the positions of one pass at which each row's adapter acts, ``[batch, tokens]`` bool.

    ``rules`` maps adapters to their :class:`~.Acts`; a row without an adapter or a rule is True everywhere.
    ``ids`` and ``mask`` are ``[batch, tokens]``. ``before`` ``[batch]`` bool says in which rows the adapter
    has acted in earlier passes; None for the first pass.

    Example:
        >>> from adapterpack.adapter_methods.core.token_positions import Invoked
        >>> acting({"a": Invoked((7,))}, ["a", None], np.array([[5, 7, 6]] * 2), np.ones((2, 3)),
        ...     None).astype(int).tolist()
        [[0, 1, 1], [1, 1, 1]]
    """
    positions = np.ones(ids.shape, bool)
    for name in {name for name in names if name is not None}:
        acts = rules.get(name)
        if acts is not None:
            rows = np.array([row for row, other in enumerate(names) if other == name])
            real = mask[rows] > 0
            positions[rows] = acts.mask(ids[rows], real, real, None if before is None else before[rows])
    return positions


def require_positions(pack: Pack, sites: Mapping[str, MappedSite]) -> None:
    """Checks that a graph can restrict an adapter to the positions at which it acts.

    Raises:
        Unsupported: the adapter acts at some positions only, and a site of the graph has no input for them.
    """
    for group in pack.manifest.groups if pack.acts is not None else ():
        if group.role == "adapter" and not (group.path in sites and sites[group.path].positional):
            raise Unsupported(
                "this adapter acts at some positions of a row only, which this graph does not ask for",
                where=group.path,
                found=str(pack.acts)[:80],
                remedy="export the bundle again with this adapter among the packs",
            )
