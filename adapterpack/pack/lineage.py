"""Records the parents of a pack that was made from other packs, and their known ancestors, by digest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError, FormatError
from ..manifest import Lineage, Parent
from .pack import Pack

MAX_DEPTH = 8
"""The most generations that a manifest can name."""

MAX_ANCESTORS = 256
"""The most ancestors that a manifest can name."""


def weights_of(packs: Sequence[Any], weights: Sequence[float] | None, default: float) -> list[float]:
    """Returns one finite weight for each pack; by default ``default``.

    Raises:
        ConfigError: the number of weights is not that of the packs, or a weight is not finite.
    """
    factors = [default] * len(packs) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(packs):
        raise ConfigError(
            "every pack needs one weight",
            where="weights",
            expected=len(packs),
            found=len(factors),
            remedy="give as many weights as packs, in the same order",
        )
    if not all(map(math.isfinite, factors)):
        raise ConfigError(
            "a weight is not a finite number",
            where="weights",
            found=", ".join(map(str, factors)),
            remedy="give finite numbers",
        )
    return factors


def descend(
    operation: str, parents: Sequence[Pack], params: Mapping[str, Any], weights: Sequence[float] | None = None
) -> Lineage:
    """Returns the lineage of the result of ``operation`` on ``parents``; ancestors beyond the manifest's
    depth limit are dropped.

    Raises:
        FormatError: the ancestors recorded by the parents contradict each other.
    """
    shares = weights if weights is not None else [None] * len(parents)
    parents_of = _parents_of(parents)
    generation = depths([parent.id for parent in parents], parents_of)
    if generation is None:
        raise FormatError(
            "by what the packs say of their lineage, one is among its own ancestors",
            where=", ".join(parent.name for parent in parents),
            remedy="see what validate says of each, or pack them again",
        )
    # The nearest generations come first, so the limit on their number drops the most distant ones.
    near = sorted(
        (digest for digest in parents_of if generation[digest] < MAX_DEPTH),
        key=lambda digest: (generation[digest], digest),
    )
    return Lineage(
        operation,
        tuple(Parent(parent.id, parent.name, share) for parent, share in zip(parents, shares, strict=True)),
        params,
        ancestors={digest: parents_of[digest] for digest in sorted(near[:MAX_ANCESTORS])},
    )


def _parents_of(parents: Sequence[Pack]) -> dict[str, tuple[str, ...]]:
    """Returns digest -> its parents' digests: for each parent from its own manifest, for earlier ancestors
    from the parents' manifests.
    """
    parents_of: dict[str, tuple[str, ...]] = {}
    for pack in parents:
        if pack.manifest.lineage is not None:
            own_parents = tuple(dict.fromkeys(parent.digest for parent in pack.manifest.lineage.parents))
            for digest, before in {**pack.manifest.lineage.ancestors, pack.id: own_parents}.items():
                if set(parents_of.setdefault(digest, before)) != set(before):
                    raise FormatError(
                        "two packs name different parents of the same ancestor",
                        where=pack.name,
                        found=digest[:17],
                        remedy="see what validate says of each, or pack them again",
                    )
    return {digest: before for digest, before in parents_of.items() if before}


def depths(parents: list[str], ancestors: Mapping[str, tuple[str, ...]]) -> dict[str, int] | None:
    """Returns the generation of every reachable pack (parents are 1) along the longest path; None if there is
    a cycle.

    Example:
        >>> depths(["a"], {"a": ("b",), "b": ("c",)}), depths(["a"], {"a": ("a",)})
        ({'c': 3, 'b': 2, 'a': 1}, None)
    """
    order = []
    state = {}  # False: on the way down, True: done
    stack = [(parent, False) for parent in parents]
    while stack:
        digest, leaving = stack.pop()
        if leaving:
            state[digest] = True
            order.append(digest)
        elif digest not in state:
            state[digest] = False
            stack.append((digest, True))
            for before in ancestors.get(digest, ()):
                if state.get(before) is False:
                    return None
                stack.append((before, False))
    generation = dict.fromkeys(order, 1)
    # Reversed post-order is a topological order: every pack comes before its ancestors.
    for digest in reversed(order):
        for before in ancestors.get(digest, ()):
            generation[before] = max(generation[before], generation[digest] + 1)
    return generation
