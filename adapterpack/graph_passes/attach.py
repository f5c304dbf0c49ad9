"""Attaches adapters to a graph: folded into weights, as inputs, or as a bank; one function for each mode."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ..bundle import ADAPTER_IDS, ADAPTER_POSITIONS, MappedSite, SiteMap
from ..errors import SiteNotFound, Unsupported
from ..onnx_graph import add_input, values_of
from ..pack import Pack
from ..slots import (
    FIELDS,
    FIXED,
    LABELS,
    RANK,
    ROUTED,
    TURN,
    Values,
    extents,
    is_looked_up,
    nothing,
    pad_slots,
    stack_slots,
)
from ..tasks import MAIN
from .emit import Emitter, rows_of, slot_input


def default_slot_name(path: str, field: str) -> str:
    """Returns a slot's name in graphs that adapterpack exports."""
    return f"{path}.{field}"


class AttachPlan(NamedTuple):
    """The plan of what to attach to one graph: the packs, their slot values, the sites that get slots, and
    the capacity; ``every`` linear site of the graph is known once siblings are packed. ``later`` are the uses
    after the first of modules that the graph uses several times.
    """

    packs: list[Pack]
    values: list[Values]
    sites: dict[str, MappedSite]
    base_head: Values
    slots: int
    max_rank: int
    part: str = MAIN
    slot_name: Callable[[str, str], str] = default_slot_name
    every: SiteMap = MappingProxyType({})
    later: Mapping[str, Sequence[MappedSite]] = MappingProxyType({})

    def uses(self, site: MappedSite) -> list[MappedSite]:
        """Returns a site as each use of its module in the graph sees it: they share its slots."""
        later = [
            dataclasses.replace(
                site,
                path=f"{site.path}/{number}",
                node=use.node,
                input=use.input,
                output=use.output,
                rank=use.rank,
            )
            for number, use in enumerate(self.later.get(site.path, ()), 1)
        ]
        return [site, *later]

    def in_order(self, model: ir.Model) -> list[tuple[MappedSite, str]]:
        """Returns all uses, each with the path of its site, in the order of the graph: what is added at one
        may read what is added at those before it.
        """
        every = [(use, site.path) for site in self.sites.values() for use in self.uses(site)]
        if len(every) == len(self.sites):
            return every
        place = {value.name: number for number, node in enumerate(model.graph) for value in node.outputs}
        return sorted(every, key=lambda one: place[one[0].output])


def attach_nothing(model: ir.Model, plan: AttachPlan) -> AttachPlan:
    """Attaches nothing: in the folded mode the weights changed before the graph was exported.

    Requires: nothing.
    Ensures: no site has a slot.
    """
    return plan._replace(
        sites={path: dataclasses.replace(site, fields=()) for path, site in plan.sites.items()}
    )


def attach_inputs(model: ir.Model, plan: AttachPlan) -> AttachPlan:
    """Attaches adapters by ONNX Runtime's own scheme for LoRA: each slot is an optional graph input.

    Requires: where an adapter acts at some tokens only, the site sees one vector for each token.
    Ensures: every slot is an optional input whose default has rank 0, or is the base's head.

    Raises:
        Unsupported: the graph is not as required.
    """
    emitter = Emitter(model, positions=_positions(model, plan))
    slots = {}
    for number, site in enumerate(plan.sites.values()):
        values = {}
        for field in site.fields:
            symbols = extents(field, site, f"{{}}_{number}".format)
            head = plan.base_head.get(f"{site.path}.{field}")
            values[field] = slot_input(
                model,
                plan.slot_name(site.path, field),
                nothing(field, site) if head is None else head,
                symbols,
            )
        slots[site.path] = values
    for use, path in plan.in_order(model):
        emitter.site(use, slots[path])
    _free_labels(model, plan)
    return plan


def _positions(model: ir.Model, plan: AttachPlan) -> ir.Value | None:
    """Returns the input that says at which tokens adapters act, if a site needs it."""
    placed = [use for site in plan.sites.values() if site.positional for use in plan.uses(site)]
    if not placed:
        return None
    ids = next(value for value in model.graph.inputs if value.name.endswith("input_ids"))
    value = add_input(model.graph, ADAPTER_POSITIONS, list(ids.shape)[:2], ir.DataType.BOOL)
    values = values_of(model.graph)
    for site in placed:
        shape = values[site.output].shape
        if shape is None or list(map(str, shape))[:-1] != list(map(str, value.shape)):
            raise Unsupported(
                "this site does not see one vector for each token, so its adapter cannot act at some of "
                "them only",
                where=site.path,
                expected=f"{value.shape}, and the width",
                found=str(shape),
                remedy="run this adapter under torch",
            )
    return value


def attach_bank(model: ir.Model, plan: AttachPlan) -> AttachPlan:
    """Attaches stacked slots, from which ``adapter_ids`` [batch] picks one for every row; slot 0 is the base.

    Requires: the batch is a named axis, and the first axis of each site's input, or a factor of it; as for
    :func:`attach_inputs` where an adapter acts at some tokens only.
    Ensures: every slot is an input ``[slots, ...]`` whose default holds the packs.

    Raises:
        Unsupported: the graph is not as required.
    """
    if not plan.sites and plan.part != MAIN:
        return plan
    batch = rows_of(model)
    if isinstance(batch, int) or batch.value is None:
        raise Unsupported(
            "the batch of this graph is not a named axis, so rows cannot carry different adapters",
            found=str(batch),
            remedy="export with --mode inputs or folded",
        )
    positions = _positions(model, plan)
    ids = add_input(model.graph, ADAPTER_IDS, [batch], ir.DataType.INT64)
    emitter = Emitter(model, ids, positions)

    def seen(site: MappedSite) -> MappedSite:
        return dataclasses.replace(site, flat=_is_flat(emitter.values[site.input].shape, str(batch)))

    plan = plan._replace(sites={path: seen(site) for path, site in plan.sites.items()})
    for site in (seen(use) for one in plan.sites.values() for use in plan.uses(one)):
        x = emitter.values[site.input]
        by_row = site.flat or (site.rank >= 2 and str(x.shape[0]) == str(batch))
        if site.kind == "experts":
            by_row = _joins_rows(emitter.products[site.node].every_token, str(batch))
        if site.kind in {"linear", "experts"} and not by_row:
            raise Unsupported(
                "the first axis of this site's input is not the batch, so rows cannot carry different "
                "adapters",
                where=site.path,
                expected=f"[{batch}, ...]",
                found=str(x.shape),
                remedy="export with --mode inputs or folded",
            )
    base, *ready = (
        pad_slots(values, plan.sites, plan.max_rank, plan.base_head) for values in ({}, *plan.values)
    )
    filled = stack_slots([base, *ready, *[base] * (plan.slots - 1 - len(ready))])
    slots = {}
    for site in plan.sites.values():
        values = {}
        for field in site.fields:
            name = f"{site.path}.{field}"
            slot = slot_input(model, name, filled[name], list(filled[name].shape))
            values[field] = slot if is_looked_up(field, site) else emitter.gather(site, field, slot)
        slots[site.path] = values
    for use, path in plan.in_order(model):
        emitter.site(seen(use), slots[path])
    _free_labels(model, plan, {site.output: site.labels for site in plan.sites.values()}.get("logits"))
    return plan


def _is_flat(shape: ir.Shape, batch: str) -> bool:
    """Whether a site's input joins rows with something else of each: with their tokens
    (``[batch*sequence, in]``), or with the windows of an image (``[4*batch, tokens, in]``).
    """
    if isinstance(shape[0], int) or shape[0].value is None:
        return False
    whole = str(shape[0].value).replace(" ", "")
    before = ""
    while whole != before:  # what stands in parentheses is one factor
        whole, before = re.sub(r"(//|\b\w+)?\([^()]*\)", "n", whole), whole
    factors = whole.split("*")
    return len(factors) > 1 and batch in factors and all(re.fullmatch(r"\w+(//\w+)?", one) for one in factors)


def _joins_rows(axis: ir.SymbolicDim | int, batch: str) -> bool:
    """Whether an axis counts the tokens of all rows."""
    if isinstance(axis, int) or axis.value is None:
        return False
    factors = [factor.strip() for factor in str(axis.value).split("*")]
    return len(factors) == 2 and batch in factors and all(factor.isidentifier() for factor in factors)


MODES: dict[str, Callable[[ir.Model, AttachPlan], AttachPlan]] = {
    "folded": attach_nothing,
    "inputs": attach_inputs,
    "bank": attach_bank,
}
"""Mode -> the pass that attaches adapters so."""


_FIELDS = {
    "lookup": frozenset({"down", "up", "scale", "shift"}),
    "patches": frozenset({"down", "up", "delta", "scale", "shift"}),
}
"""Kind of a site that is no linear layer -> the fields that it can have."""


def with_fields(
    sites: SiteMap, values: list[Values], default: Collection[str] | None = None
) -> dict[str, MappedSite]:
    """Returns the sites that the packs change, each with the union of the fields that they need. Without
    packs, returns the linear sites among ``default``, or all of them, each with a low-rank slot.

    Raises:
        SiteNotFound: the graph has none of the ``default`` sites.
        Unsupported: one pack replaces a module that another pack adapts.
    """
    if not values:
        linear = {
            path: site
            for path, site in sites.items()
            if site.kind == "linear" and (default is None or path in default)
        }
        if default and not linear:
            raise SiteNotFound(
                "the graph has no site for any layer that training adapts",
                expected=min(default),
                found=", ".join(list(sites)[:5]),
                remedy="name the packs that the graph is to carry",
            )
        return {path: dataclasses.replace(site, fields=("down", "up")) for path, site in linear.items()}
    fields: dict[str, set[str]] = {}
    labels: dict[str, int] = {}
    for name, array in (item for tensors in values for item in tensors.items()):
        path, _, field = name.rpartition(".")
        fields.setdefault(path, set()).add(field)
        if field == "head":
            labels[path] = max(labels.get(path, sites[path].out_features), array.shape[-1])
    for path, path_fields in fields.items():
        room = _FIELDS.get(sites[path].kind)
        if room is not None and path_fields - room:
            raise Unsupported(
                "at this kind of layer a graph has slots only for what is added to its output or scales it",
                where=path,
                found=", ".join(sorted(path_fields)),
                expected=", ".join(sorted(room)),
                remedy="export with --mode folded",
            )
        if path in labels and path_fields != {"head", "head_bias"}:
            raise Unsupported(
                "one pack replaces this module whole and another adapts it",
                where=path,
                remedy="export them apart",
            )
    return {
        path: dataclasses.replace(
            sites[path],
            fields=tuple(sorted(fields[path])),
            role="full" if path in labels else "adapter",
            labels=labels.get(path, 0),
        )
        for path in sorted(fields, key=list(sites).index)
    }


_ELSEWHERE = FIXED | {RANK, TURN, LABELS}
"""Axes of slots that are widths of the base, have one size at all sites, or follow another rule."""


def with_ranks(sites: SiteMap, ranks: Mapping[str, int], least: int) -> dict[str, MappedSite]:
    """Returns the sites with the sizes of their slots' own axes, as the packs need them at each site, so that
    one wide site does not pad the others.
    """
    sized = {axis: number if axis in ROUTED else max(least, number) for axis, number in ranks.items()}
    result = {}
    for path, site in sites.items():
        axes = {axis for field in site.fields for axis in FIELDS[field].axes} - _ELSEWHERE
        result[path] = dataclasses.replace(site, ranks={axis: sized[axis] for axis in sorted(axes)})
    return result


def base_head(model: ir.Model, sites: SiteMap) -> Values:
    """Returns the graph's own weights of the modules that the packs replace, as slot values."""
    values = {}
    for path, site in sites.items():
        if site.role == "full":
            weight = model.graph.initializers[site.weight].const_value.numpy()
            values[f"{path}.head"] = np.array(weight.T if site.layout == "out_in" else weight, site.dtype)
            # An exporter drops a bias that is all zero, as that of a fresh head is.
            bias = (
                np.zeros(site.out_features)
                if site.bias is None
                else model.graph.initializers[site.bias].const_value.numpy()
            )
            values[f"{path}.head_bias"] = np.array(bias, site.dtype)
    return values


def _free_labels(model: ir.Model, plan: AttachPlan, width: int | None = None) -> None:
    """Makes the width of the logits follow the slots instead of the base's head: ``width``, or the width of
    the active adapter.
    """
    if any(site.role == "full" for site in plan.sites.values()):
        for value in model.graph.outputs:
            if value.name == "logits":
                value.shape = ir.Shape([*list(value.shape)[:-1], width or "labels"])
