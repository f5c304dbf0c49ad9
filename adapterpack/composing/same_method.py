"""Combines packs of one method within that method, where a sum of its changes is again a change of the
method: (IA)^3 packs give an (IA)^3 pack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..adapter_methods import Method, Site
from ..adapter_methods.nodes.composed import pack_config
from ..errors import NonFinite, NothingToDo
from ..pack.lineage import descend
from ..pack.pack import Adapter, Pack
from .arguments import checked_weights
from .compatibility import common_base, require_same_site
from .full_modules import apply_policy
from .rules.rule import RULES
from .steps import CompositionRequest, describe


def within_method(parents: Sequence[Pack], request: CompositionRequest, name: str) -> Pack | None:
    """Returns the weighted sum of the packs' changes as a pack of their own method, exactly; None where that
    method has no such sums, or the request asks for a LoRA.

    This works if the rule's coefficients follow from the weights alone, nothing is truncated, all packs are
    of one method that has such sums (:class:`~adapterpack.adapter_methods.core.base.Overrides`), and they
    share one config at each site. The weights of PEFT's ``add_weighted_adapter`` for (IA)^3 give the same
    numbers where their sum is 1; here a weight multiplies the change, as in every rule.

    Raises:
        BaseMismatch, ConfigError, UnknownName, Unsupported: as for
            :func:`~adapterpack.composing.pipeline.compose`.
        NothingToDo: the combined change is zero everywhere.
        NonFinite: it is too large for float32.
    """
    rule, method = RULES[request.rule], common_sums(parents, request)
    combine = None if method is None else method.overrides.get("linear_combination")
    if method is None or combine is None or rule.coefficients is None:
        return None
    arguments = rule.arguments(request.params)
    weights = checked_weights(parents, request.weights, unit=rule.unit)
    base = common_base(parents)
    order = sorted(
        range(len(parents)), key=lambda index: (parents[index].name, parents[index].id, weights[index])
    )
    sites = _sites([parents[index] for index in order])
    coefficients = rule.coefficients([weights[index] for index in order], **arguments)
    by_name = dict(zip(order, coefficients, strict=True))
    adapters: dict[Site, tuple[Any, Mapping[str, np.ndarray]]] = {}
    changed = False
    for path, present in sites.items():
        site, config = present[0][1].site, present[0][1].config
        terms = [(adapter.wide, by_name[order[index]]) for index, adapter in present]
        params, nothing = combine(terms), combine([])
        if not all(np.isfinite(value).all() for value in params.values()):
            raise NonFinite(
                "the combined change is too large for float32", where=path, remedy="choose smaller weights"
            )
        changed = changed or any(bool((value != nothing[key]).any()) for key, value in params.items())
        adapters[site] = config, params
    ordered = [parents[index] for index in order]
    whole = apply_policy(request.whole, ordered, [weights[index] for index in order])
    if not changed and not whole.modules:
        raise NothingToDo(
            "the combined change is zero at every site",
            where=", ".join(parent.name for parent in parents),
            found=f"weights {', '.join(f'{weight:g}' for weight in weights)}",
            remedy="choose weights under which something is left",
        )
    details = {**arguments, **({"whole": request.whole} if whole.modules else {})}
    tensors = {
        path: next((one.weight for _, one in present if one.weight is not None), None)
        for path, present in sites.items()
    }
    return describe(
        name,
        method,
        adapters,
        base,
        whole,
        parents,
        tensors,
        descend(request.rule, parents, details, weights),
    )


def common_sums(parents: Sequence[Pack], request: CompositionRequest) -> Method | None:
    """Returns the method that all packs share if the request is for a sum that this method can represent;
    else None.
    """
    methods = {method.name: method for parent in parents for method in parent.methods}
    method = next(iter(methods.values())) if len(methods) == 1 else None
    if (
        RULES[request.rule].coefficients is None
        or request.cuts
        or method is None
        or "linear_combination" not in method.overrides
    ):
        return None
    alike = all(
        pack_config(adapter.config) == pack_config(first.config)
        for (_, first), *others in _sites(parents).values()
        for _, adapter in others
    )
    return method if alike else None


def _sites(packs: Sequence[Pack]) -> dict[str, list[tuple[int, Adapter]]]:
    """Maps each path to the adapters there, each with the index of its pack."""
    sites: dict[str, list[tuple[int, Adapter]]] = {}
    for index, pack in enumerate(packs):
        for adapter in pack.adapters():
            present = sites.setdefault(adapter.site.path, [])
            if present:
                require_same_site((packs[present[0][0]].name, present[0][1].site), (pack.name, adapter.site))
            present.append((index, adapter))
    return sites
